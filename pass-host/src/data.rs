//! From paths on the command line to batches of augmented crops.
//!
//! | module | job |
//! |---|---|
//! | [`index`] | folders, files, lists, tars and shards -> one sorted, hashed, cached list of images |
//! | [`shard`] | many images in one file, mapped and read in place |
//! | [`decode`] | bytes of an image file -> upright 8-bit RGB, or a reason why not |
//! | [`augment`] | one image -> crops, as a pure function of (seed, epoch, image, crop) |
//! | [`quarantine`] | which images are bad and why |
//! | [`order`] | which image comes when |
//! | [`loader`] | worker threads and batches |

mod archive;
pub mod augment;
pub mod decode;
mod error;
pub mod index;
mod index_cache;
pub mod loader;
pub mod order;
pub mod quarantine;
pub mod shard;
mod sources;

pub use decode::{DecodeError, Rgb8Image};
pub use error::DataError;
pub use index::ImageIndex;
pub use loader::{Batch, Loader, LoaderSettings, Part, Views};
pub(crate) use sources::is_image_name;
