//! stub
#![allow(missing_docs, clippy::all)]
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct DataError;
impl DataError { pub fn hint(&self)->Option<String>{None} }
pub mod index { pub struct ImageIndex; impl ImageIndex { pub fn build(_:&crate::config::DataConfig,_:Option<&std::path::Path>)->Result<Self,super::DataError>{Ok(Self)} pub fn len(&self)->usize{0} pub fn name(&self,_:u64)->String{String::new()} pub fn read(&self,_:u64)->Result<Vec<u8>,super::DataError>{Err(super::DataError)} pub fn manifest_hash(&self)->u64{0} } }
pub mod loader {
 use std::sync::Arc;
 pub struct Batch{pub images:Vec<u64>,pub epoch:u64,pub global:Vec<f32>,pub local:Vec<f32>}
 pub struct LoaderSettings{pub index:Arc<super::index::ImageIndex>,pub augment:crate::config::AugmentConfig,pub seed:u64,pub batch:usize,pub workers:usize,pub prefetch:usize,pub first_batch:u64,pub max_bad:f64,pub max_megapixels:f64,pub quarantine:Option<std::path::PathBuf>}
 pub struct Loader; impl Loader{pub fn start(_:LoaderSettings)->Result<Self,super::DataError>{Ok(Self)} pub fn next(&mut self)->Result<Batch,super::DataError>{Err(super::DataError)} pub fn data_wait(&self)->f64{0.}}
}
pub mod augment { #[derive(Default)] pub struct Augmenter; impl Augmenter { pub fn prepare_center(&mut self,_:&super::decode::Rgb8Image,_:usize,_:usize,_:[f32;3],_:[f32;3])->Vec<f32>{vec![]} } }
pub mod decode { pub struct Rgb8Image; pub fn decode_rgb(_:&[u8],_:f64)->Result<Rgb8Image,super::DataError>{Err(super::DataError)} }
