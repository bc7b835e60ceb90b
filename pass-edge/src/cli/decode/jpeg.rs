//! JPEG: the structure of the file is walked here, its coded data decoded by `zune-jpeg` or, where components have scans of
//! their own, by `jpeg-decoder`.
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

use super::{DecodeError, Picture};

/// What the markers of a complete JPEG say.
pub(super) struct Layout<'a> {
    /// The file from its start to its end marker, both included, without stray bytes between segments.
    bytes: Cow<'a, [u8]>,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) orientation: Orientation,
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
            progressive: frame.progressive,
            in_several_scans: frame.scans > 1 && !frame.progressive,
        })
    }

    /// Decodes at full size.
    pub(super) fn decode(&self) -> Result<Picture, DecodeError> {
        // the fast decoder takes subsampled components of their own scans for interleaved ones
        let rgb = if self.in_several_scans { self.decode_scans()? } else { self.decode_interleaved()? };
        let (height, width) = (self.height as usize, self.width as usize);
        if rgb.len() != 3 * width * height {
            return Err(malformed("frame headers contradict each other"));
        }
        Ok(Picture { height, width, rgb })
    }

    fn decode_interleaved(&self) -> Result<Vec<u8>, DecodeError> {
        let end = self.bytes.len() - if self.progressive { 0 } else { 2 };
        let options = DecoderOptions::default()
            .set_strict_mode(true)
            .set_max_width(usize::from(u16::MAX))
            .set_max_height(usize::from(u16::MAX))
            .jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(&self.bytes[..end]), options);
        decoder.decode().map_err(|error| match error {
            DecodeErrors::ExhaustedData => truncated("the coded data ends before the last block"),
            DecodeErrors::FormatStatic("Premature end of buffer") => {
                truncated("the coded data ends before the last block")
            }
            other => malformed(&format!("{other:?}")),
        })
    }

    fn decode_scans(&self) -> Result<Vec<u8>, DecodeError> {
        let mut decoder = jpeg_decoder::Decoder::new(&*self.bytes);
        decoder.set_max_decoding_buffer_size(usize::MAX);
        let data = decoder.decode().map_err(|error| malformed(&error.to_string()))?;
        match decoder.info().map(|info| info.pixel_format) {
            Some(jpeg_decoder::PixelFormat::RGB24) => Ok(data),
            _ => Err(malformed("components of their own scans that are not three colors")),
        }
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
        let (width, height) = (width.into(), height.into());
        Ok(Self { width, height, progressive: marker == 0xC2, scans: 0, components })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_of_their_own_scans_show_the_same_picture() {
        let decode = |name: &str| {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/odd-images/made");
            let bytes = std::fs::read(folder.join(name)).expect("a fixture");
            Layout::read(&bytes).expect("complete").decode().expect("a picture")
        };
        let (one, several) = (decode("baseline-420.jpg"), decode("separate-scans-420.jpg"));
        assert_eq!((one.width, one.height), (several.width, several.height));
        let differences: Vec<u8> = one.rgb.iter().zip(&several.rgb).map(|(a, b)| a.abs_diff(*b)).collect();
        // two decoders, whose sums round differently and which smooth the halved colors differently
        let mean = differences.iter().map(|&d| f64::from(d)).sum::<f64>() / differences.len() as f64;
        assert!(mean < 1.0, "{mean}");
    }
}
