//! Shards: all images of a data set in one file that is mapped into memory and read in place.
//!
//! # The file, version 1
//!
//! All numbers are little-endian, all offsets count bytes from the start of the file, all checksums are XXH3-64.
//!
//! | part | bytes | what it is |
//! |---|---|---|
//! | header | 80 | see below |
//! | images | | one image file after the other, without gaps, in the order of the index |
//! | names | | the names of the images one after the other, in the same order |
//! | index | 56 an image | entries of one size: image `i` is found without looking at any other |
//!
//! | header | at | |
//! |---|---|---|
//! | magic | 0 | the 16 characters `pass image shard` |
//! | version | 16 | `u32`; a reader refuses any other than its own |
//! | zero | 20 | `u32` |
//! | images | 24 | `u64`, their number |
//! | names | 32, 40 | `u64` offset and `u64` length |
//! | index | 48 | `u64` offset; the index ends where the file ends |
//! | length | 56 | `u64` of the whole file |
//! | content | 64 | checksum of names and index together: equal lists of equal images have equal ones |
//! | checksum | 72 | of the header up to here |
//!
//! | entry | at | |
//! |---|---|---|
//! | image | 0, 8 | `u64` offset and `u64` length |
//! | checksum | 16 | of the image's bytes |
//! | name | 24 | `u64` offset |
//! | name length | 32 | `u32` |
//! | width, height | 36, 40 | `u32` each, in pixels, upright |
//! | format | 44 | `u32`: 0 the bytes of the source, 1 encoded anew as JPEG, 2 raw pixels as binary PPM |
//! | checksum | 48 | of the entry up to here, then its name; seeded with the number of the entry |
//!
//! Every image is a complete image file, raw ones included: what reads a folder decodes a shard.
//!
//! Opening reads the header alone, so it costs the same for ten images and for a billion; an entry is checked when it is
//! used, an image when it is read. Whatever the bytes are, the answer is an error and never a panic.

mod error;
mod format;
mod reader;
mod writer;

pub use error::ShardError;
pub use format::{Entry, Stored, VERSION};
pub use reader::{Shard, is_shard};
pub use writer::{NewImage, ShardWriter, Written};

#[cfg(test)]
mod tests;
