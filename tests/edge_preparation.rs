//! The device shows its network the very pixels the trainer does: the same photo prepared by both.

use std::path::{Path, PathBuf};

use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::resize::{Filter, Fit, Resize, ResizeScratch};
use pass_host::data::augment::Augmenter;
use pass_host::data::decode::{Rgb8Image, decode_rgb};
use pass_host::random::{Purpose, Stream};

/// The trainer's evaluation view as bytes, `[size, size, 3]`.
fn on_host(image: &Rgb8Image, size: usize) -> Vec<u8> {
    let resize = (size as f64 / 0.875).round() as usize;
    let planes =
        Augmenter::default().prepare_center(image, (resize, resize), (size, size), [0.0; 3], [1.0; 3]);
    let byte = |value: f32| (value * 255.0).round() as u8;
    let pixels = size * size;
    (0..3 * pixels).map(|at| byte(planes[at % 3 * pixels + at / 3])).collect()
}

fn on_device(image: &Rgb8Image, size: usize) -> Vec<u8> {
    let (height, width) = (image.height as usize, image.width as usize);
    let frame = Image::new(&image.data, (height, width), 3 * width, PixelOrder::Rgb).expect("an image");
    let plan = Resize::new((height, width), (size, size), Fit::CenterCrop, Filter::Bicubic).expect("sizes");
    let len = plan.scratch_len();
    let (mut words, mut bytes) = (vec![0; len.words], vec![0; len.bytes]);
    let mut scratch = ResizeScratch { words: &mut words, bytes: &mut bytes };
    let mut out = vec![0; 3 * size * size];
    plan.resize_into(&frame, Kernel::best(), &mut scratch, &mut out).expect("resized");
    out
}

fn check(image: &Rgb8Image, what: &str) {
    for size in [224, 96, 98] {
        let (host, device) = (on_host(image, size), on_device(image, size));
        let different = host.iter().zip(&device).filter(|(a, b)| a != b).count();
        assert_eq!(different, 0, "{what} at {size}: {different} of {} bytes", host.len());
    }
}

fn photos() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/photos");
    let mut photos = Vec::new();
    for class in std::fs::read_dir(folder).expect("the photos") {
        for photo in std::fs::read_dir(class.expect("a class").path()).expect("photos") {
            photos.push(photo.expect("a photo").path());
        }
    }
    photos.sort();
    photos.into_iter().step_by(12).collect()
}

#[test]
fn real_photos_become_the_same_bytes() {
    let photos = photos();
    assert!(photos.len() >= 20, "{} photos", photos.len());
    for path in photos {
        let image = decode_rgb(&std::fs::read(&path).expect("readable"), 100.0).expect("a photo");
        check(&image, &path.display().to_string());
    }
}

#[test]
fn odd_shapes_become_the_same_bytes() {
    let mut stream = Stream::new(1, Purpose::Subset, &[]);
    // tall and wide enough for either order of the passes, smaller and larger than the view
    for (width, height) in
        [(1, 1), (3, 500), (500, 3), (101, 700), (700, 101), (257, 255), (640, 480), (97, 97)]
    {
        let data = (0..width * height * 3).map(|_| stream.bits() as u8).collect();
        check(&Rgb8Image { width, height, data }, &format!("{width}x{height}"));
    }
}
