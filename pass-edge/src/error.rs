//! The one error of this crate.

use core::fmt;

/// Why a model was refused or an argument not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The bytes do not start like a `.pass` file.
    NotAModel,
    /// The file is of a version this reader does not know.
    UnknownVersion {
        /// The version in the file.
        found: u32,
        /// The version this reader knows.
        known: u32,
    },
    /// The checksum of the file does not fit its contents.
    Checksum {
        /// The checksum in the file.
        stored: u64,
        /// The checksum of the bytes.
        computed: u64,
    },
    /// The header is no header: it ends too early, or a value has an impossible encoding.
    Header,
    /// A number lies outside its range.
    OutOfRange {
        /// The field or argument.
        what: &'static str,
        /// Smallest accepted value.
        min: usize,
        /// Largest accepted value.
        max: usize,
        /// The value given.
        actual: usize,
    },
    /// A size is no multiple of another.
    NotDivisible {
        /// The field or argument.
        what: &'static str,
        /// The value given.
        actual: usize,
        /// What it must be a multiple of.
        divisor: usize,
    },
    /// A buffer or the file does not hold the promised number of elements.
    LengthMismatch {
        /// The argument.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        actual: usize,
    },
    /// A tensor differs from what the architecture asks for.
    Tensor {
        /// The transformer block it belongs to, if any.
        block: Option<usize>,
        /// Its name, without the block.
        name: &'static str,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A number that must be finite (and, where it divides, positive) is not.
    NotFinite {
        /// The field.
        what: &'static str,
    },
    /// The operating system gives no more threads.
    Threads,
    /// The self-test computed other features than the file promises.
    SelfTest {
        /// The digest in the file.
        expected: u64,
        /// The digest of the features computed here.
        actual: u64,
    },
    /// The mathematics of `pass-core` refused an argument.
    Core(pass_core::Error),
}

impl From<pass_core::Error> for Error {
    fn from(error: pass_core::Error) -> Self {
        Self::Core(error)
    }
}

/// What can be wrong with one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// The table has another name in its place, or ends before it.
    Name,
    /// Another element type.
    Kind,
    /// Another shape.
    Shape,
    /// Another offset than the layout gives, or one past the end of the file.
    Offset,
    /// A number that is not finite.
    NotFinite,
    /// Another number of elements than its shape.
    Length,
    /// An int8 weight beyond the limit of the file's mode.
    WeightLimit,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "missing from its place in the tensor table",
            Self::Kind => "of the wrong element type",
            Self::Shape => "of the wrong shape",
            Self::Offset => "at an offset outside the layout",
            Self::NotFinite => "no finite number everywhere",
            Self::Length => "of the wrong number of elements",
            Self::WeightLimit => "with a weight beyond the limit of the file's mode",
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotAModel => f.write_str("not a .pass file"),
            Self::Core(error) => error.fmt(f),
            Self::UnknownVersion { found, known } => {
                write!(f, "file format version {found}, this reader knows version {known}")
            }
            Self::Checksum { stored, computed } => {
                write!(f, "the file is damaged: checksum {stored:016x} stored, {computed:016x} computed")
            }
            Self::Header => f.write_str("the header cannot be decoded"),
            Self::Threads => f.write_str("the operating system gives no more threads"),
            Self::OutOfRange { what, min, max, actual } => {
                write!(f, "{what}: expected {min} to {max}, found {actual}")
            }
            Self::NotDivisible { what, actual, divisor } => {
                write!(f, "{what}: expected a multiple of {divisor}, found {actual}")
            }
            Self::LengthMismatch { what, expected, actual } => {
                write!(f, "{what}: expected {expected} elements, found {actual}")
            }
            Self::Tensor { block: Some(block), name, problem } => {
                write!(f, "tensor `blocks.{block}.{name}` is {problem}")
            }
            Self::Tensor { block: None, name, problem } => write!(f, "tensor `{name}` is {problem}"),
            Self::NotFinite { what } => write!(f, "{what}: expected a finite number"),
            Self::SelfTest { expected, actual } => {
                write!(f, "self-test: expected feature digest {expected:016x}, computed {actual:016x}")
            }
        }
    }
}

impl core::error::Error for Error {}

/// The result of this crate's checked functions.
pub type Result<T> = core::result::Result<T, Error>;

/// Checks a number against its range.
pub(crate) fn check_range(what: &'static str, min: usize, max: usize, actual: usize) -> Result<()> {
    if (min..=max).contains(&actual) { Ok(()) } else { Err(Error::OutOfRange { what, min, max, actual }) }
}

/// Checks that a size is a multiple of another, which is not zero.
pub(crate) fn check_multiple(what: &'static str, divisor: usize, actual: usize) -> Result<()> {
    if actual.is_multiple_of(divisor) { Ok(()) } else { Err(Error::NotDivisible { what, actual, divisor }) }
}

/// The first `needed` elements of a buffer handed in by the caller.
pub(crate) fn prefix_mut<'a, T>(
    what: &'static str,
    needed: usize,
    buffer: &'a mut [T],
) -> Result<&'a mut [T]> {
    let actual = buffer.len();
    buffer.get_mut(..needed).ok_or(Error::LengthMismatch { what, expected: needed, actual })
}

/// A buffer cut in two, the first part of `at` elements.
pub(crate) fn split_mut<'a, T>(
    what: &'static str,
    at: usize,
    buffer: &'a mut [T],
) -> Result<(&'a mut [T], &'a mut [T])> {
    let actual = buffer.len();
    buffer.split_at_mut_checked(at).ok_or(Error::LengthMismatch { what, expected: at, actual })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn messages_name_the_field_and_both_numbers() {
        let error = Error::UnknownVersion { found: 7, known: 1 };
        assert_eq!(error.to_string(), "file format version 7, this reader knows version 1");
        let error = Error::Tensor { block: Some(3), name: "attn.qkv.weight", problem: Problem::Shape };
        assert_eq!(error.to_string(), "tensor `blocks.3.attn.qkv.weight` is of the wrong shape");
        let error = check_range("depth", 1, 64, 65).unwrap_err();
        assert_eq!(error.to_string(), "depth: expected 1 to 64, found 65");
    }
}
