//! The one error of this crate.

use core::fmt;

/// What was wrong with an argument. Nothing is written to an output buffer before all arguments were accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A buffer does not hold the promised number of elements.
    LengthMismatch {
        /// The argument.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        actual: usize,
    },
    /// A size lies outside its range.
    OutOfRange {
        /// The argument.
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
        /// The argument.
        what: &'static str,
        /// The value given.
        actual: usize,
        /// What it must be a multiple of.
        divisor: usize,
    },
    /// A window side is even: a window is centered on its patch.
    EvenWindow {
        /// The side given.
        side: usize,
    },
    /// A temperature is not a positive finite number.
    NotPositive {
        /// The argument.
        what: &'static str,
    },
    /// An array view is not contiguous and row-major.
    NotContiguous {
        /// The argument.
        what: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::LengthMismatch { what, expected, actual } => {
                write!(f, "{what}: expected {expected} elements, found {actual}")
            }
            Self::OutOfRange { what, min, max, actual } => {
                write!(f, "{what}: expected {min} to {max}, found {actual}")
            }
            Self::NotDivisible { what, actual, divisor } => {
                write!(f, "{what}: expected a multiple of {divisor}, found {actual}")
            }
            Self::EvenWindow { side } => write!(f, "window: expected an odd side, found {side}"),
            Self::NotPositive { what } => write!(f, "{what}: expected a positive finite number"),
            Self::NotContiguous { what } => write!(f, "{what}: expected a contiguous row-major array"),
        }
    }
}

impl core::error::Error for Error {}

/// The result of this crate's checked functions.
pub type Result<T> = core::result::Result<T, Error>;

/// Checks a buffer length at the door.
pub(crate) fn check_length(what: &'static str, expected: usize, actual: usize) -> Result<()> {
    if expected == actual { Ok(()) } else { Err(Error::LengthMismatch { what, expected, actual }) }
}

/// Checks that a scratch buffer is large enough.
pub(crate) fn check_scratch(what: &'static str, needed: usize, actual: usize) -> Result<()> {
    if actual >= needed { Ok(()) } else { Err(Error::LengthMismatch { what, expected: needed, actual }) }
}

/// Checks that a temperature can divide logits.
pub(crate) fn check_positive(what: &'static str, value: f32) -> Result<()> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { Err(Error::NotPositive { what }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn messages_name_the_argument_and_both_numbers() {
        let error = check_length("out", 8, 6).unwrap_err();
        assert_eq!(error.to_string(), "out: expected 8 elements, found 6");
        let error = Error::OutOfRange { what: "k", min: 1, max: 8, actual: 9 };
        assert_eq!(error.to_string(), "k: expected 1 to 8, found 9");
    }

    #[test]
    fn a_temperature_of_zero_or_nan_is_refused() {
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(check_positive("temperature", value).is_err());
        }
        assert!(check_positive("temperature", 0.1).is_ok());
    }
}
