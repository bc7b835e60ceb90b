//! Frames with their masks painted over them: a strip of moments of a sequence (Figure 4 of the paper) and a moving picture.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use image::codecs::gif::{GifEncoder, Repeat};
use image::imageops::{FilterType, resize};
use image::{Delay, DynamicImage, Frame as GifFrame, RgbImage};

use super::error::VosError;
use super::masks::{LabelImage, color};
use crate::checkpoint::{CheckpointError, write_atomically};
use crate::data::decode::Rgb8Image;
use crate::picture::canvas::Canvas;
use crate::picture::sheet::{Panel, Row, Sheet};

/// Moments on a strip.
const MOMENTS: usize = 5;
/// Width of a panel of the strip, in pixels.
const PANEL_WIDTH: u32 = 320;
/// Width of the moving picture, in pixels.
const GIF_WIDTH: u32 = 427;
/// Time a frame is shown: DAVIS has 24 frames a second, here every one can be seen.
const FRAME_TIME: Duration = Duration::from_millis(80);
/// Effort of choosing colors, 1 to 30: the encoder's own middle.
const GIF_SPEED: i32 = 10;

/// The pictures of one sequence as they come.
pub(super) struct Film {
    folder: PathBuf,
    name: String,
    frames: usize,
    panels: Vec<Panel>,
    gif: GifEncoder<Bytes>,
    encoded: Bytes,
}

/// Bytes that can be taken once the encoder, which ends the file when it goes, is gone.
#[derive(Clone, Default)]
struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Write for Bytes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Film {
    /// Pictures of a sequence of `frames` frames, `{folder}/{name}.png` and `.gif`.
    ///
    /// # Errors
    /// [`VosError::Write`] and [`VosError::Encode`].
    pub(super) fn start(folder: &Path, name: &str, frames: usize) -> Result<Self, VosError> {
        fs::create_dir_all(folder).map_err(|source| CheckpointError::Io {
            action: "create",
            path: folder.to_owned(),
            source,
        })?;
        let encoded = Bytes::default();
        let mut gif = GifEncoder::new_with_speed(encoded.clone(), GIF_SPEED);
        let path = || folder.join(format!("{name}.gif"));
        gif.set_repeat(Repeat::Infinite).map_err(|source| VosError::Encode { path: path(), source })?;
        Ok(Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            frames,
            panels: Vec::new(),
            gif,
            encoded,
        })
    }

    /// The next frame.
    ///
    /// # Errors
    /// [`VosError::Encode`].
    pub(super) fn add(&mut self, index: usize, image: &Rgb8Image, mask: &LabelImage) -> Result<(), VosError> {
        let painted = painted(image, mask);
        if is_moment(index, self.frames) {
            let number = index + 1;
            let caption = match index {
                0 => "frame 1, given".to_owned(),
                _ => format!("frame {number} of {}", self.frames),
            };
            self.panels.push(Panel { picture: canvas(&scaled(&painted, PANEL_WIDTH)), caption });
        }
        let small = DynamicImage::from(scaled(&painted, GIF_WIDTH)).into_rgba8();
        let frame = GifFrame::from_parts(small, 0, 0, Delay::from_saturating_duration(FRAME_TIME));
        let path = || self.folder.join(format!("{}.gif", self.name));
        self.gif.encode_frame(frame).map_err(|source| VosError::Encode { path: path(), source })
    }

    /// Writes both files.
    ///
    /// # Errors
    /// [`VosError::Write`] and [`VosError::Encode`].
    pub(super) fn finish(self, note: String) -> Result<(), VosError> {
        let path = |ending: &str| self.folder.join(format!("{}.{ending}", self.name));
        let sheet = Sheet {
            title: self.name.clone(),
            rows: vec![Row { label: String::new(), panels: self.panels }],
            note,
            ..Sheet::default()
        };
        let png = sheet.draw().to_png().map_err(|source| VosError::Encode { path: path("png"), source })?;
        write_atomically(&path("png"), &png)?;
        drop(self.gif);
        let gif = self.encoded.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(write_atomically(&path("gif"), &gif)?)
    }
}

/// The first frame, the last, and some between them at equal distances.
fn is_moment(index: usize, frames: usize) -> bool {
    let last = frames.saturating_sub(1);
    (0..MOMENTS).any(|moment| (moment * last + (MOMENTS - 1) / 2) / (MOMENTS - 1) == index)
}

/// Objects half in their color, their outlines in full. `mask` is of the picture's size.
fn painted(image: &Rgb8Image, mask: &LabelImage) -> RgbImage {
    let (height, width) = mask.size;
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let (x, y) = (x as usize, y as usize);
        let at = y * width + x;
        let (pixel, label) = (&image.data[3 * at..3 * at + 3], mask.labels[at]);
        let here = |x: usize, y: usize| mask.labels[y * width + x];
        let outline = (x + 1 < width && here(x + 1, y) != label)
            || (x > 0 && here(x - 1, y) != label)
            || (y + 1 < height && here(x, y + 1) != label)
            || (y > 0 && here(x, y - 1) != label);
        let paint = bright(color(label));
        let mix = |channel: usize| match (label, outline) {
            (0, _) => pixel[channel],
            (_, true) => paint[channel],
            (_, false) => u8::midpoint(pixel[channel], paint[channel]),
        };
        image::Rgb([mix(0), mix(1), mix(2)])
    })
}

/// The palette's colors are made for masks alone; over a picture they are lost in its shadows.
fn bright(color: [u8; 3]) -> [u8; 3] {
    color.map(|channel| channel.saturating_mul(2))
}

/// As wide as told, in the same proportions; never enlarged.
fn scaled(image: &RgbImage, width: u32) -> RgbImage {
    let width = width.min(image.width());
    let height = (u64::from(image.height()) * u64::from(width) / u64::from(image.width())).max(1);
    resize(image, width, height as u32, FilterType::Triangle)
}

fn canvas(image: &RgbImage) -> Canvas {
    let mut canvas = Canvas::new(image.width() as usize, image.height() as usize, [0; 3]);
    canvas.map(canvas.bounds(), |x, y, _| image.get_pixel(x as u32, y as u32).0);
    canvas
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::AnimationDecoder;
    use image::codecs::gif::GifDecoder;

    #[test]
    fn moments_begin_and_end_with_the_sequence() {
        let moments =
            |frames: usize| (0..frames).filter(|index| is_moment(*index, frames)).collect::<Vec<_>>();
        assert_eq!(moments(50), [0, 12, 25, 37, 49]);
        assert_eq!(moments(5), [0, 1, 2, 3, 4]);
        assert_eq!(moments(3), [0, 1, 2]);
    }

    #[test]
    fn objects_are_painted_and_outlined_and_the_rest_is_left() {
        let image = Rgb8Image { width: 5, height: 4, data: vec![100; 60] };
        let mut mask = LabelImage { size: (4, 5), labels: vec![0; 20] };
        for (x, y) in [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)] {
            mask.labels[y * 5 + x] = 1;
        }
        let painted = painted(&image, &mask);
        assert_eq!(painted.get_pixel(0, 3).0, [100; 3]);
        assert_eq!(painted.get_pixel(1, 1).0, [255, 0, 0]);
        assert_eq!(painted.get_pixel(2, 1).0, [177, 50, 50]);
    }

    #[test]
    fn a_film_leaves_a_strip_and_a_moving_picture() {
        let folder = tempfile::tempdir().unwrap();
        let mut film = Film::start(&folder.path().join("new"), "dog", 7).unwrap();
        let image = Rgb8Image { width: 600, height: 300, data: vec![90; 600 * 300 * 3] };
        let mut mask = LabelImage { size: (300, 600), labels: vec![0; 600 * 300] };
        for index in 0..7 {
            mask.labels[index * 600..index * 600 + 40].fill(2);
            film.add(index, &image, &mask).unwrap();
        }
        film.finish("a note".into()).unwrap();
        let bytes = |name: &str| fs::read(folder.path().join("new").join(name)).unwrap();
        let strip = crate::data::decode::decode_rgb(&bytes("dog.png"), 9.0).unwrap();
        assert!(strip.width as usize > MOMENTS * PANEL_WIDTH as usize && strip.height > 160);
        let gif = bytes("dog.gif");
        let frames =
            GifDecoder::new(std::io::Cursor::new(&gif)).unwrap().into_frames().collect_frames().unwrap();
        assert_eq!(frames.len(), 7);
        assert_eq!(frames[0].buffer().dimensions(), (GIF_WIDTH, 213));
    }
}
