//! Raw frames on standard input, as a camera pipeline writes them.

use std::io::{self, Read};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pass_edge::image::{Image, PixelOrder, Plane, YuvColor};
use pass_edge::resize::MOST_SOURCE;

use crate::cli::error::Error;

/// How frames lie in the stream.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Raw frames (INPUT is `-`)")]
pub(super) struct FrameArgs {
    /// Width and height in pixels [default: those of the model].
    #[arg(long, value_name = "WxH", value_parser = size)]
    size: Option<(usize, usize)>,
    /// rgb, bgr, gray (8 bits each), or nv12 (luma, then pairs of Cb and Cr at half the size) [default: rgb].
    #[arg(long, value_enum, value_name = "FORMAT", hide_possible_values = true)]
    format: Option<Format>,
    /// Bytes from the start of a row to the start of the next, in every plane [default: without padding].
    #[arg(long, value_name = "BYTES")]
    stride: Option<usize>,
    /// What nv12 means: bt601, bt709 (luma 16 to 235), bt601-full or bt709-full (0 to 255) [default: bt601].
    #[arg(long, value_enum, value_name = "COLOR", hide_possible_values = true)]
    color: Option<Color>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Rgb,
    Bgr,
    Gray,
    Nv12,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    Bt601,
    Bt709,
    Bt601Full,
    Bt709Full,
}

/// `(height, width)` from `640x480`.
fn size(text: &str) -> Result<(usize, usize), String> {
    let parse = |side: &str| side.parse().ok().filter(|side| (1..=MOST_SOURCE).contains(side));
    let sides = text.split_once('x').and_then(|(width, height)| Some((parse(height)?, parse(width)?)));
    sides.ok_or_else(|| format!("expected width and height from 1 to {MOST_SOURCE}, for example 640x480"))
}

impl FrameArgs {
    /// These flags mean nothing for image files.
    pub(super) fn refuse_without_stream(&self) -> Result<(), Error> {
        let given = [
            ("--size", self.size.is_some()),
            ("--format", self.format.is_some()),
            ("--stride", self.stride.is_some()),
            ("--color", self.color.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => Err(Error::usage(
                format!("`{flag}` describes raw frames, but no input is `-`"),
                "image files say themselves what they are; leave the flag out",
            )),
        }
    }
}

/// A frame that is none.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the stream ends within it: expected {expected} bytes, found {found}")]
pub(super) struct ShortFrame {
    expected: usize,
    found: usize,
}

/// The frames of standard input.
pub(super) struct Frames {
    size: (usize, usize),
    stride: usize,
    format: Format,
    color: YuvColor,
    buffer: Vec<u8>,
}

impl Frames {
    /// Frames as described; `model_size` is `(height, width)`.
    pub(super) fn new(
        args: &FrameArgs,
        model_size: (usize, usize),
        max_megapixels: f64,
    ) -> Result<Self, Error> {
        let (height, width) = args.size.unwrap_or(model_size);
        if height as f64 * width as f64 > max_megapixels * 1e6 {
            return Err(Error::usage(
                format!("`--size {width}x{height}`: more than {max_megapixels} megapixels"),
                "if frames are that large, raise `--max-megapixels`",
            ));
        }
        let format = args.format.unwrap_or(Format::Rgb);
        if args.color.is_some() && format != Format::Nv12 {
            return Err(Error::usage("`--color` is for `--format nv12`", "leave it out"));
        }
        let row = match format {
            Format::Rgb | Format::Bgr => 3 * width,
            Format::Gray => width,
            Format::Nv12 => width.next_multiple_of(2),
        };
        // chroma of an odd width has one byte more a row than luma; without padding the planes differ in stride
        let stride = args.stride.unwrap_or(if format == Format::Nv12 { width } else { row });
        let least = if format == Format::Nv12 { width } else { row };
        if stride < least || stride > 64 * MOST_SOURCE {
            return Err(Error::usage(
                format!("`--stride {stride}`: a row of {width} pixels has {least} bytes"),
                "the stride counts the bytes of a row with its padding",
            ));
        }
        let color = match args.color.unwrap_or(Color::Bt601) {
            Color::Bt601 => YuvColor::Bt601,
            Color::Bt709 => YuvColor::Bt709,
            Color::Bt601Full => YuvColor::Bt601Full,
            Color::Bt709Full => YuvColor::Bt709Full,
        };
        let mut frames = Self { size: (height, width), stride, format, color, buffer: Vec::new() };
        frames.buffer = vec![0; frames.luma_bytes() + frames.chroma_stride() * frames.chroma_rows()];
        Ok(frames)
    }

    fn luma_bytes(&self) -> usize {
        self.stride * self.size.0
    }

    fn chroma_stride(&self) -> usize {
        self.stride.max(self.size.1.next_multiple_of(2))
    }

    fn chroma_rows(&self) -> usize {
        if self.format == Format::Nv12 { self.size.0.div_ceil(2) } else { 0 }
    }

    /// The next frame; `None` at the end of the stream.
    pub(super) fn next(&mut self) -> Result<Option<Result<Image<'_>, ShortFrame>>, Error> {
        let found = read_up_to(&mut io::stdin().lock(), &mut self.buffer)
            .map_err(|source| Error::Read { path: PathBuf::from("-"), source })?;
        if found == 0 {
            return Ok(None);
        }
        if found < self.buffer.len() {
            return Ok(Some(Err(ShortFrame { expected: self.buffer.len(), found })));
        }
        let packed = |order| Image::new(&self.buffer, self.size, self.stride, order);
        let image = match self.format {
            Format::Rgb => packed(PixelOrder::Rgb),
            Format::Bgr => packed(PixelOrder::Bgr),
            Format::Gray => packed(PixelOrder::Gray),
            Format::Nv12 => {
                let (luma, chroma) = self.buffer.split_at(self.luma_bytes());
                let luma = Plane { bytes: luma, stride: self.stride };
                let chroma = Plane { bytes: chroma, stride: self.chroma_stride() };
                Image::nv12(luma, chroma, self.size, self.color)
            }
        };
        Ok(Some(Ok(image?)))
    }
}

/// Fills `buffer` as far as the stream goes.
fn read_up_to(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut found = 0;
    while found < buffer.len() {
        match stream.read(&mut buffer[found..]) {
            Ok(0) => break,
            Ok(count) => found += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_width_before_height() {
        assert_eq!(size("640x480"), Ok((480, 640)));
        for text in ["640", "640x", "0x5", "5x65536", "-1x5", "axb", "1x2x3"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_frame_has_the_bytes_of_its_planes() {
        let bytes = |size, format, stride| {
            let args = FrameArgs { size: Some(size), format: Some(format), stride, color: None };
            Frames::new(&args, (1, 1), 100.0).map(|frames| frames.buffer.len()).ok()
        };
        assert_eq!(bytes((2, 5), Format::Rgb, None), Some(30));
        assert_eq!(bytes((2, 5), Format::Gray, Some(8)), Some(16));
        assert_eq!(bytes((4, 6), Format::Nv12, None), Some(36));
        assert_eq!(bytes((3, 5), Format::Nv12, None), Some(15 + 2 * 6));
        assert_eq!(bytes((4, 6), Format::Nv12, Some(16)), Some(96));
        assert_eq!(bytes((2, 5), Format::Bgr, Some(14)), None);
        assert_eq!(bytes((2, 5), Format::Bgr, Some(usize::MAX)), None);
        assert_eq!(bytes((65_535, 65_535), Format::Bgr, None), None);
    }

    #[test]
    fn pieces_become_a_frame() {
        let mut buffer = [0; 5];
        let mut pieces = (&b"ab"[..]).chain(&b"cd"[..]);
        assert_eq!(read_up_to(&mut pieces, &mut buffer).expect("readable"), 4);
        assert_eq!(&buffer, b"abcd\0");
    }
}
