//! The crops of one image as work for a device: its pixels, the weights of their resampling and a record of everything
//! else, as bytes. Whatever decides on bits (draws, weights, box kernels) is computed here, by the code of the CPU path.

use super::blur::BoxKernel;
use super::crop::reduced_span;
use super::hue::shift_of;
use super::planes::Planes;
use super::resample::{FRACTION_BITS, Weights, vertical_first};
use super::{CropPlan, Jitter};
use crate::data::decode::Rgb8Image;

/// Every part of the bytes begins at a multiple of this.
const ALIGNMENT: usize = 16;

/// The crops of one image, to be made by a device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceCrops {
    /// Pixels and weights.
    bytes: Vec<u8>,
    crops: Vec<Crop>,
}

/// What the device is told of one crop; places count from the first byte of the image's.
#[derive(Clone, Debug, Default, PartialEq)]
struct Crop {
    /// The first pixel that is looked at.
    source: usize,
    /// Weights along rows and along columns.
    horizontal: usize,
    vertical: usize,
    /// Bytes from a row, a column, a channel to the next.
    strides: [u32; 3],
    columns: usize,
    rows: usize,
    size: usize,
    vertical_first: bool,
    flip: bool,
    gray: bool,
    solarize: bool,
    /// Nothing to blur if its center is 0.
    blur: Option<BoxWords>,
    jitter: [(u32, u32); 4],
}

/// Reach, center and edge of a box kernel.
type BoxWords = [u32; 3];

impl DeviceCrops {
    /// Bytes of the record of a crop (`Crop` in `ops/cuda/augment.cu`).
    pub const RECORD: usize = 112;

    /// Crops of `image`, which shows the whole picture at `1/reduction` of the size the plans were drawn for.
    ///
    /// # Panics
    /// When a plan reaches beyond the image.
    pub fn of_image(image: Rgb8Image, reduction: u32, plans: &[CropPlan]) -> Self {
        let Rgb8Image { width, height, data } = image;
        let mut made = Self { bytes: data, crops: Vec::with_capacity(plans.len()) };
        let row = 3 * width as usize;
        let mut weights = Weights::default();
        for plan in plans {
            let region = plan.region;
            let columns = reduced_span(region.left, region.width, reduction, width);
            let rows = reduced_span(region.top, region.height, reduction, height);
            weights.compute(columns, plan.size);
            let horizontal = made.append_axis(&weights, columns.first(), plan.size);
            weights.compute(rows, plan.size);
            let vertical = made.append_axis(&weights, rows.first(), plan.size);
            made.crops.push(Crop {
                source: rows.first() * row + 3 * columns.first(),
                horizontal,
                vertical,
                strides: [row as u32, 3, 1],
                columns: columns.count(),
                rows: rows.count(),
                size: plan.size,
                vertical_first: vertical_first(columns.count(), rows.count(), plan.size, plan.size),
                flip: plan.flip,
                gray: plan.gray,
                solarize: plan.solarize,
                blur: plan
                    .blur
                    .map(BoxKernel::of_gaussian)
                    .filter(|kernel| !kernel.changes_nothing())
                    .map(|kernel| [kernel.reach as u32, kernel.center, kernel.edge]),
                jitter: plan.jitter.map_or([(0, 0); 4], |jitter| jitter.map(operation)),
            });
        }
        made
    }

    /// Crops that are finished but for their normalization.
    pub fn finished(crops: &[Planes]) -> Self {
        let mut made = Self::default();
        let mut axis: Option<(usize, usize)> = None;
        for planes in crops {
            let size = planes.width();
            let at = match axis {
                Some((known, at)) if known == size => at,
                _ => made.append_identity(size),
            };
            axis = Some((size, at));
            made.align();
            let source = made.bytes.len();
            made.bytes.extend_from_slice(planes.data());
            made.crops.push(Crop {
                source,
                horizontal: at,
                vertical: at,
                strides: [size as u32, 1, (size * size) as u32],
                columns: size,
                rows: size,
                size,
                ..Crop::default()
            });
        }
        made
    }

    /// Number of crops.
    pub fn len(&self) -> usize {
        self.crops.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.crops.is_empty()
    }

    /// Pixels and weights, a multiple of 16 bytes once padded with zeros.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes between the two passes of the resampling of crop `crop`.
    pub fn middle(&self, crop: usize) -> usize {
        let Crop { size, columns, rows, vertical_first, .. } = self.crops[crop];
        3 * size * if vertical_first { columns } else { rows }
    }

    /// Writes the record of crop `crop` for bytes that begin at `base` and a middle that begins at `middle`.
    ///
    /// # Panics
    /// When `out` does not have [`DeviceCrops::RECORD`] bytes.
    pub fn write_record(&self, crop: usize, base: u64, middle: u64, out: &mut [u8]) {
        assert_eq!(out.len(), Self::RECORD, "bytes of a record");
        let crop = &self.crops[crop];
        let (long, rest) = out.split_at_mut(32);
        let places = [crop.source, crop.horizontal, crop.vertical].map(|place| base + place as u64);
        let places = places.into_iter().chain([middle]);
        long.chunks_exact_mut(8)
            .zip(places)
            .for_each(|(out, place)| out.copy_from_slice(&place.to_le_bytes()));
        let blur = crop.blur.unwrap_or_default();
        let words = crop
            .strides
            .into_iter()
            .chain([crop.columns as u32, crop.rows as u32])
            .chain([crop.vertical_first, crop.flip, crop.gray, crop.solarize].map(u32::from))
            .chain(blur)
            .chain(crop.jitter.map(|(kind, _)| kind))
            .chain(crop.jitter.map(|(_, factor)| factor));
        rest.chunks_exact_mut(4).zip(words).for_each(|(out, word)| out.copy_from_slice(&word.to_le_bytes()));
    }

    /// The weights of an axis of `size` output pixels: for each its first pixel behind `origin`, the place and the number of
    /// its weights, then all weights.
    fn append_axis(&mut self, weights: &Weights, origin: usize, size: usize) -> usize {
        self.align();
        let start = self.bytes.len();
        let mut place = 0u32;
        for i in 0..size {
            let (first, taps) = weights.of(i);
            for word in [(first - origin) as u32, place, taps.len() as u32] {
                self.bytes.extend_from_slice(&word.to_le_bytes());
            }
            place += taps.len() as u32;
        }
        for i in 0..size {
            self.bytes.extend(weights.of(i).1.iter().flat_map(|tap| tap.to_le_bytes()));
        }
        start
    }

    /// The axis that keeps `size` pixels as they are.
    fn append_identity(&mut self, size: usize) -> usize {
        self.align();
        let start = self.bytes.len();
        for i in 0..size as u32 {
            self.bytes.extend([i, i, 1].into_iter().flat_map(u32::to_le_bytes));
        }
        self.bytes.extend((0..size).flat_map(|_| (1u32 << FRACTION_BITS).to_le_bytes()));
        start
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// An operation of the color jitter: its kind, and its factor as bits.
fn operation(jitter: Jitter) -> (u32, u32) {
    match jitter {
        Jitter::Brightness(factor) => (1, (factor as f32).to_bits()),
        Jitter::Contrast(factor) => (2, (factor as f32).to_bits()),
        Jitter::Saturation(factor) => (3, (factor as f32).to_bits()),
        Jitter::Hue(turns) => (4, u32::from(shift_of(turns))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::augment::CropBox;

    fn words_of(record: &[u8]) -> Vec<u32> {
        record.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
    }

    /// Six rows to four and four columns to four: rows first.
    #[test]
    fn a_record_says_where_pixels_and_weights_are() {
        let image = Rgb8Image { width: 10, height: 8, data: (0..240).map(|i| i as u8).collect() };
        let plan = CropPlan {
            region: CropBox { left: 2, top: 1, width: 4, height: 6 },
            size: 4,
            flip: true,
            jitter: Some([
                Jitter::Hue(-0.01),
                Jitter::Contrast(0.5),
                Jitter::Saturation(1.5),
                Jitter::Brightness(2.0),
            ]),
            gray: false,
            blur: Some(0.0),
            solarize: true,
        };
        let crops = DeviceCrops::of_image(image, 1, &[plan]);
        assert_eq!((crops.len(), crops.middle(0)), (1, 3 * 4 * 4));
        let mut record = [0; DeviceCrops::RECORD];
        crops.write_record(0, 1 << 33, 77, &mut record);
        let words = words_of(&record);
        let place = |i: usize| u64::from(words[2 * i]) + (u64::from(words[2 * i + 1]) << 32) - (1 << 33);
        assert_eq!(place(0), 36, "one row of 30 bytes and two pixels");
        assert_eq!((words[6], words[7]), (77, 0));
        assert_eq!(words[8..13], [30, 3, 1, 4, 6], "strides, columns, rows");
        assert_eq!(words[13..17], [1, 1, 0, 1], "order, flip, gray, solarize");
        assert_eq!(words[17..20], [0, 0, 0], "a radius of nothing is no blur");
        assert_eq!(words[20..24], [4, 2, 3, 1]);
        assert_eq!(words[24..28], [254, 0.5f32.to_bits(), 1.5f32.to_bits(), 2.0f32.to_bits()]);
        let axis = |at: u64, i: usize| {
            let at = at as usize + 12 * i;
            words_of(&crops.bytes()[at..at + 12])
        };
        // four columns stay four: one weight counts, of up to five
        let [first, start, count] = axis(place(1), 1)[..] else { panic!("three words") };
        let taps = place(1) as usize + 12 * 4 + 4 * start as usize;
        let taps = words_of(&crops.bytes()[taps..taps + 4 * count as usize]);
        assert_eq!(taps[(1 - first) as usize], 1 << FRACTION_BITS);
        assert_eq!(taps.iter().fold(0u32, |sum, tap| sum.wrapping_add(*tap)), 1 << FRACTION_BITS);
    }

    #[test]
    fn finished_crops_are_their_own_bytes() {
        let planes = Planes::from_interleaved(3, 3, &(0..27).collect::<Vec<u8>>());
        let crops = DeviceCrops::finished(&[planes.clone(), planes.clone()]);
        let mut record = [0; DeviceCrops::RECORD];
        crops.write_record(1, 0, 0, &mut record);
        let words = words_of(&record);
        let source = words[0] as usize;
        assert_eq!(crops.bytes()[source..source + 27], *planes.data());
        assert_eq!(words[8..13], [3, 1, 9, 3, 3]);
        assert!(words[13..].iter().all(|word| *word == 0), "nothing is left to do");
    }
}
