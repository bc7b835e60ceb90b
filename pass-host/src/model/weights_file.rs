//! A safetensors file of weights: the header first, which tells whose names they have, then tensor by tensor, so that
//! memory holds every weight once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::tensor::Metadata;

use super::weights::WeightsError;
use super::{resnet, timm};

/// Bytes of the length that a file starts with.
const LENGTH: u64 = 8;
/// Bytes of a header, as the format allows.
const LARGEST_HEADER: u64 = 100_000_000;

/// Whose names the tensors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// Our own, as [`TrainedWeights`](super::weights::TrainedWeights) reads them.
    Own,
    /// timm's, as [`TimmVit`](timm::TimmVit) reads them.
    Timm,
    /// torchvision's ResNet-50, as [`ResNetFile`](resnet::ResNetFile) reads them.
    ResNet,
}

/// An open file whose header is right.
#[derive(Debug)]
pub struct WeightsFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the values start.
    start: u64,
}

impl WeightsFile {
    /// Reads the header.
    ///
    /// # Errors
    /// [`WeightsError::Io`], and [`WeightsError::Format`] for a file that is cut or of another kind.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { path: path.into(), source };
        let format = |reason: String| WeightsError::Format { path: path.into(), reason };
        let mut file = File::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        if found < LENGTH {
            return Err(format(format!("{found} bytes are too few")));
        }
        let mut length = [0; LENGTH as usize];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > LARGEST_HEADER.min(found - LENGTH) {
            return Err(format(format!("a header of {length} bytes in a file of {found}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| format(format!("its header: {error}")))?;
        let start = LENGTH + length;
        let expected = start + header.data_len() as u64;
        if found != expected {
            return Err(format(format!("expected {expected} bytes, found {found}")));
        }
        Ok(Self { path: path.into(), file, header, start })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose names it has.
    pub fn names(&self) -> Names {
        match self.header.info(resnet::MARK).is_some() {
            true => Names::ResNet,
            false if self.header.info(timm::MARK).is_some() => Names::Timm,
            false => Names::Own,
        }
    }

    /// What the header says beside the tensors.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// Every tensor, in its own type.
    ///
    /// # Errors
    /// If the file cannot be read, or a tensor is of a type that is not known here.
    pub fn tensors(&mut self, device: &Device) -> Result<HashMap<String, Tensor>, WeightsError> {
        let mut tensors = HashMap::new();
        let mut bytes = Vec::new();
        for (name, info) in self.header.tensors() {
            let (from, to) = info.data_offsets;
            bytes.resize(to - from, 0);
            let read = (self.file)
                .seek(SeekFrom::Start(self.start + from as u64))
                .and_then(|_| self.file.read_exact(&mut bytes));
            read.map_err(|source| WeightsError::Io { path: self.path.clone(), source })?;
            let tensor = Tensor::from_raw_buffer(&bytes, info.dtype.try_into()?, &info.shape, device)?;
            tensors.insert(name, tensor);
        }
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &Path, names: &[&str]) -> PathBuf {
        let path = folder.join("weights.safetensors");
        let values = |index: usize| Tensor::new(&[index as f32, 0.5], &Device::Cpu).unwrap();
        let tensors: HashMap<_, _> =
            names.iter().enumerate().map(|(index, name)| ((*name).to_owned(), values(index))).collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        path
    }

    #[test]
    fn the_header_tells_whose_names_they_are() {
        let folder = tempfile::tempdir().unwrap();
        for (name, expected) in
            [("backbone.pos_embed", Names::Own), (timm::MARK, Names::Timm), (resnet::MARK, Names::ResNet)]
        {
            let mut file = WeightsFile::open(&file(folder.path(), &["a", name])).unwrap();
            assert_eq!(file.names(), expected);
            let tensors = file.tensors(&Device::Cpu).unwrap();
            let read = |name: &str| tensors[name].to_vec1::<f32>().unwrap();
            assert_eq!((read("a"), read(name), tensors.len()), (vec![0.0, 0.5], vec![1.0, 0.5], 2));
        }
    }

    #[test]
    fn cut_longer_and_foreign_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), &["a", "b"]);
        let whole = std::fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = WeightsFile::open(&path).unwrap_err().to_string();
            assert!(error.contains("weights.safetensors"), "{error}");
        };
        (0..whole.len()).for_each(|end| refused(&whole[..end]));
        refused(&[&whole[..], &[0]].concat());
        refused(&u64::MAX.to_le_bytes());
        refused(b"\x80\x02}q\x00(X\x05\x00\x00\x00model");
        assert!(WeightsFile::open(&folder.path().join("none.safetensors")).is_err());
    }
}
