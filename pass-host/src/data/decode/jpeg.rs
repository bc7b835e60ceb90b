//! JPEG: the structure of the file is walked here, its coded data decoded by `zune-jpeg` (full size) or
//! `jpeg-decoder` (reduced size).
//!
//! Decoders fill what a cut file lacks with gray and say nothing, so completeness is checked here. The end marker must
//! be there. Of a sequential JPEG the decoder then sees the data *without* the end marker: it has to find every block
//! before the data is over, or reports that it ran out. Of a progressive one the scans must have refined every
//! coefficient of every component to its last bit.

use std::borrow::Cow;

use image::metadata::Orientation;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::errors::DecodeErrors;

use super::{DecodeError, Rgb8Image};

/// Images below this many pixels are decoded at full size: the start of a reduced decoding costs more than it saves.
const MIN_PIXELS_TO_REDUCE: u64 = 1 << 20;

/// What the markers of a complete JPEG say.
pub(super) struct Layout<'a> {
    /// The file from its start to its end marker, both included, without stray bytes between segments.
    bytes: Cow<'a, [u8]>,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) orientation: Orientation,
    components: usize,
    progressive: bool,
    /// Whether the components of a sequential image are coded one after the other.
    in_several_scans: bool,
}

impl<'a> Layout<'a> {
    /// Walks all markers.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut frame: Option<Frame> = None;
        let mut orientation = Orientation::NoTransforms;
        let mut cleaned = Vec::new();
        let mut kept_from = 0;
        let mut at = 2;
        loop {
            let end_of_segment = at;
            let (marker, start) = next_marker(bytes, &mut at)?;
            if start > end_of_segment {
                cleaned.extend_from_slice(&bytes[kept_from..end_of_segment]);
                kept_from = start;
            }
            match marker {
                END => break,
                // markers without a segment
                0x01 | 0xD0..=0xD8 => continue,
                _ => {}
            }
            let segment = segment(bytes, &mut at)?;
            match marker {
                0xC4 | 0xC8 | 0xCC => {}
                0xC0..=0xCF => frame = Some(Frame::read(marker, segment)?),
                0xE1 => {
                    let exif = segment.strip_prefix(b"Exif\0\0").and_then(Orientation::from_exif_chunk);
                    orientation = exif.unwrap_or(orientation);
                }
                SCAN => {
                    let frame =
                        frame.as_mut().ok_or_else(|| malformed("a scan comes before the frame header"))?;
                    frame.add_scan(segment)?;
                    skip_coded_data(bytes, &mut at);
                }
                _ => {}
            }
        }
        let frame = frame.ok_or_else(|| malformed("no frame header"))?;
        if frame.width == 0 || frame.height == 0 {
            return Err(malformed("width or height is zero"));
        }
        if !frame.is_complete() {
            return Err(truncated("scans are missing"));
        }
        let rest = &bytes[kept_from..at];
        let bytes =
            if cleaned.is_empty() { Cow::Borrowed(rest) } else { Cow::Owned([&cleaned, rest].concat()) };
        Ok(Self {
            bytes,
            width: frame.width,
            height: frame.height,
            orientation,
            components: frame.components.len(),
            progressive: frame.progressive,
            in_several_scans: frame.scans > 1 && !frame.progressive,
        })
    }

    pub(super) fn can_reduce(&self, reduction: u32) -> bool {
        let pixels = u64::from(self.width) * u64::from(self.height);
        reduction == 1
            || matches!(reduction, 2 | 4 | 8)
                && matches!(self.components, 1 | 3)
                && pixels >= MIN_PIXELS_TO_REDUCE
    }

    pub(super) fn decode(&self, reduction: u32) -> Result<Rgb8Image, DecodeError> {
        if reduction == 1 && self.in_several_scans {
            // the fast decoder takes subsampled components of their own scans for interleaved ones
            return self.decode_reduced(1).ok_or_else(|| malformed("a scan cannot be decoded"));
        }
        if reduction == 1 {
            return self.decode_full();
        }
        match self.decode_reduced(reduction) {
            Some(image) => Ok(image),
            // the verdict is that of the full size
            None => Ok(shrink(&self.decode(1)?, reduction)),
        }
    }

    fn decode_full(&self) -> Result<Rgb8Image, DecodeError> {
        let end = self.bytes.len() - if self.progressive { 0 } else { 2 };
        let options = DecoderOptions::default()
            .set_strict_mode(true)
            .set_max_width(usize::from(u16::MAX))
            .set_max_height(usize::from(u16::MAX))
            .jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(&self.bytes[..end]), options);
        let data = decoder.decode().map_err(|error| match error {
            DecodeErrors::ExhaustedData => truncated("the coded data ends before the last block"),
            DecodeErrors::FormatStatic("Premature end of buffer") => {
                truncated("the coded data ends before the last block")
            }
            other => malformed(&format!("{other:?}")),
        })?;
        if data.len() != 3 * self.width as usize * self.height as usize {
            return Err(malformed("frame headers contradict each other"));
        }
        Ok(Rgb8Image { width: self.width, height: self.height, data })
    }

    /// `None` when the decoder does not want it.
    pub(super) fn decode_reduced(&self, reduction: u32) -> Option<Rgb8Image> {
        let (width, height) = (self.width.div_ceil(reduction), self.height.div_ceil(reduction));
        let mut decoder = jpeg_decoder::Decoder::new(&*self.bytes);
        decoder.set_max_decoding_buffer_size(usize::MAX);
        if decoder.scale(width as u16, height as u16).ok()? != (width as u16, height as u16) {
            return None;
        }
        let mut data = decoder.decode().ok()?;
        match decoder.info()?.pixel_format {
            jpeg_decoder::PixelFormat::RGB24 => {}
            jpeg_decoder::PixelFormat::L8 => data = data.into_iter().flat_map(|value| [value; 3]).collect(),
            _ => return None,
        }
        (data.len() == 3 * width as usize * height as usize).then_some(Rgb8Image { width, height, data })
    }
}

/// Start of scan.
const SCAN: u8 = 0xDA;
/// End of image.
const END: u8 = 0xD9;

fn truncated(detail: &str) -> DecodeError {
    DecodeError::Truncated { format: "JPEG", detail: detail.to_owned() }
}

fn malformed(detail: &str) -> DecodeError {
    DecodeError::Malformed { format: "JPEG", detail: detail.to_owned() }
}

/// The next marker code and the offset of its 0xFF; `at` moves behind it.
fn next_marker(bytes: &[u8], at: &mut usize) -> Result<(u8, usize), DecodeError> {
    loop {
        let rest = bytes.get(*at..).unwrap_or_default();
        let skipped = rest.iter().position(|&byte| byte == 0xFF).ok_or_else(|| truncated("no end marker"))?;
        let start = *at + skipped;
        let fill = rest[skipped..].iter().position(|&byte| byte != 0xFF);
        let code = start + fill.ok_or_else(|| truncated("no end marker"))?;
        *at = code + 1;
        if bytes[code] != 0 {
            return Ok((bytes[code], code - 1));
        }
    }
}

/// The contents of a marker segment; `at` moves behind it.
fn segment<'a>(bytes: &'a [u8], at: &mut usize) -> Result<&'a [u8], DecodeError> {
    let rest = bytes.get(*at..).unwrap_or_default();
    let [high, low, ..] = *rest else { return Err(truncated("a segment is cut")) };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length < 2 {
        return Err(malformed("a segment of negative length"));
    }
    *at += length;
    rest.get(2..length).ok_or_else(|| truncated("a segment is cut"))
}

/// Moves `at` to the 0xFF of the first marker that is neither a stuffed byte nor a restart.
fn skip_coded_data(bytes: &[u8], at: &mut usize) {
    while let Some(skipped) = bytes[*at..].iter().position(|&byte| byte == 0xFF) {
        *at += skipped;
        match bytes.get(*at + 1) {
            Some(0x00 | 0xD0..=0xD7) => *at += 2,
            Some(0xFF) => *at += 1,
            _ => return,
        }
    }
    *at = bytes.len();
}

/// A frame header and what the scans have delivered so far.
struct Frame {
    width: u32,
    height: u32,
    progressive: bool,
    scans: usize,
    components: Vec<Component>,
}

struct Component {
    id: u8,
    /// Per coefficient, the lowest bit delivered; [`MISSING`] before the first scan.
    lowest_bit: [u8; 64],
}

const MISSING: u8 = u8::MAX;

impl Frame {
    fn read(marker: u8, segment: &[u8]) -> Result<Self, DecodeError> {
        if !matches!(marker, 0xC0..=0xC2) {
            return Err(malformed("arithmetic, lossless or hierarchical coding"));
        }
        let [_, h1, h0, w1, w0, count, ref rest @ ..] = *segment else {
            return Err(malformed("the frame header is too short"));
        };
        let components: Vec<_> =
            rest.chunks_exact(3).map(|c| Component { id: c[0], lowest_bit: [MISSING; 64] }).collect();
        if components.len() != usize::from(count) || components.is_empty() {
            return Err(malformed("the frame header contradicts its length"));
        }
        let (width, height) = (u16::from_be_bytes([w1, w0]), u16::from_be_bytes([h1, h0]));
        Ok(Self {
            width: width.into(),
            height: height.into(),
            progressive: marker == 0xC2,
            scans: 0,
            components,
        })
    }

    fn add_scan(&mut self, segment: &[u8]) -> Result<(), DecodeError> {
        self.scans += 1;
        let count = usize::from(segment.first().copied().unwrap_or_default());
        let (Some(ids), Some(&[first, last, bits])) =
            (segment.get(1..1 + 2 * count), segment.get(1 + 2 * count..).and_then(|rest| rest.first_chunk()))
        else {
            return Err(malformed("a scan header is too short"));
        };
        let (range, lowest) = if self.progressive { (first..=last.min(63), bits & 15) } else { (0..=63, 0) };
        for id in ids.iter().step_by(2) {
            for component in self.components.iter_mut().filter(|component| component.id == *id) {
                range.clone().for_each(|k| component.lowest_bit[usize::from(k)] = lowest);
            }
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.components.iter().all(|component| component.lowest_bit.iter().all(|&bit| bit == 0))
    }
}

/// Means of `reduction x reduction` pixels; fewer at the right and lower edge.
pub(super) fn shrink(image: &Rgb8Image, reduction: u32) -> Rgb8Image {
    let (width, height) = (image.width.div_ceil(reduction), image.height.div_ceil(reduction));
    let mut data = Vec::with_capacity(3 * width as usize * height as usize);
    for row in 0..height {
        let rows = row * reduction..((row + 1) * reduction).min(image.height);
        for column in 0..width {
            let columns = column * reduction..((column + 1) * reduction).min(image.width);
            let count = (rows.len() * columns.len()) as u32;
            for channel in 0..3 {
                let value = |row: u32, column: u32| {
                    u32::from(
                        image.data[(row as usize * image.width as usize + column as usize) * 3 + channel],
                    )
                };
                let sum: u32 = rows
                    .clone()
                    .flat_map(|r| columns.clone().map(move |c| (r, c)))
                    .map(|(r, c)| value(r, c))
                    .sum();
                data.push(((sum + count / 2) / count) as u8);
            }
        }
    }
    Rgb8Image { width, height, data }
}
