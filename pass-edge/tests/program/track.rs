//! `track`: an object followed through frames, and what is refused.

use std::fs;
use std::path::Path;

use pass_edge::format::Architecture;
use png::{BitDepth, ColorType, Decoder, Encoder, Transformations};

use crate::harness::{Place, expect_code, stderr};
use crate::random_vit::FloatVit;

/// 8 × 8 patches of 8 pixels.
const SMALL: Architecture = Architecture {
    dim: 32,
    depth: 1,
    heads: 2,
    hidden: 64,
    patch_size: 8,
    grid: (8, 8),
    class_token: true,
    register_tokens: 0,
    final_norm: true,
    layer_scale_folded: false,
    pca_components: 0,
};

const FRAMES: usize = 9;
/// Height and width of a frame.
const SIZE: (usize, usize) = (96, 128);
/// Index of the object in the masks.
const OBJECT: u8 = 5;
/// 8 colors, none of them of the palette of DAVIS.
const PALETTE: [u8; 24] = [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 250, 200, 20, 0, 0, 0, 0, 0, 0];

/// Where the object is in a frame.
fn inside(frame: usize, row: usize, column: usize) -> bool {
    let (top, left) = (12 + 3 * frame, 8 + 7 * frame);
    (top..top + 40).contains(&row) && (left..left + 48).contains(&column)
}

fn truth(frame: usize) -> Vec<u8> {
    let pixels = (0..SIZE.0).flat_map(|row| (0..SIZE.1).map(move |column| (row, column)));
    pixels.map(|(row, column)| if inside(frame, row, column) { OBJECT } else { 0 }).collect()
}

/// An orange square on blue, both with a grain that does not move with it.
fn picture(frame: usize) -> Vec<u8> {
    let mut rgb = Vec::new();
    for row in 0..SIZE.0 {
        for column in 0..SIZE.1 {
            let color = if inside(frame, row, column) { [210, 110, 20] } else { [40, 70, 160] };
            let grain = ((row * 7 + column * 13 + row * column * 3 + frame * 5) % 24) as u8;
            rgb.extend(color.map(|value: u8| value + grain));
        }
    }
    rgb
}

fn write_png(path: &Path, color: ColorType, (height, width): (usize, usize), data: &[u8]) {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(color);
    encoder.set_depth(BitDepth::Eight);
    if color == ColorType::Indexed {
        encoder.set_palette(&PALETTE[..]);
        encoder.set_trns(&[0][..]);
    }
    let mut writer = encoder.write_header().expect("a header");
    writer.write_image_data(data).expect("pixels");
    writer.finish().expect("an end");
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, bytes).expect("written");
}

/// Indices of a mask that has the palette of the first.
fn read_mask(path: &Path, size: (usize, usize)) -> Vec<u8> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut decoder = Decoder::new(std::io::Cursor::new(bytes));
    decoder.set_transformations(Transformations::IDENTITY);
    let mut reader = decoder.read_info().expect("a PNG");
    let mut labels = vec![0; reader.output_buffer_size().expect("small")];
    let info = reader.next_frame(&mut labels).expect("pixels");
    assert_eq!(
        (info.color_type, info.height as usize, info.width as usize),
        (ColorType::Indexed, size.0, size.1)
    );
    assert_eq!(reader.info().palette.as_deref(), Some(&PALETTE[..]));
    assert_eq!(reader.info().trns.as_deref(), Some(&[0][..]));
    labels
}

fn overlap(found: &[u8], truth: &[u8]) -> f64 {
    assert!(found.iter().all(|&label| label == 0 || label == OBJECT), "no other index");
    pass_edge::core::segmentation_metrics::region_similarity(truth, found, OBJECT).expect("of one size")
}

/// The folder with a model that sees colors, frames `f1.png` to `f9.png` and the mask of the first.
fn place() -> Place {
    let place = Place::new();
    let mut vit = FloatVit::random(SMALL, 11);
    // patches are told apart by what they show, not by where they are
    vit.tensors.get_mut("pos_embed").expect("positions").fill(0.0);
    fs::write(place.path("small.pass"), vit.quantized()).expect("a model");
    for frame in 0..FRAMES {
        write_png(&place.path(&format!("frames/f{}.png", frame + 8)), ColorType::Rgb, SIZE, &picture(frame));
    }
    write_png(&place.path("first.png"), ColorType::Indexed, SIZE, &truth(0));
    place
}

const TRACK: [&str; 7] = ["track", "small.pass", "frames", "--mask", "first.png", "--out", "masks"];

#[test]
fn a_moving_square_is_followed() {
    let place = place();
    let output = place.run(&[&TRACK[..], &["--overlay", "shown", "--fps", "--threads", "2"]].concat());
    expect_code(&output, 0);
    for frame in 0..FRAMES {
        let found = read_mask(&place.path(&format!("masks/f{}.png", frame + 8)), SIZE);
        let overlap = overlap(&found, &truth(frame));
        assert!(overlap > 0.6, "frame {frame}: {overlap}");
        assert!(frame > 0 || overlap == 1.0, "the first mask is kept as it is");
        assert!(place.path(&format!("shown/f{}.png", frame + 8)).exists());
    }
    let report = stderr(&output);
    assert!(report.contains("9 masks in masks") && report.contains("frames/s"), "{report}");
    assert_eq!(
        fs::read_dir(place.path("masks")).expect("masks").count(),
        FRAMES,
        "nothing temporary is left"
    );

    // a frame that stands still would lose the square: the object really was followed
    assert!(overlap(&truth(0), &truth(FRAMES - 1)) < 0.2);
}

#[test]
fn threads_and_kernels_change_nothing() {
    let place = place();
    let masks = |arguments: &[&str]| {
        expect_code(&place.run(&[&TRACK[..], arguments].concat()), 0);
        let read = |frame: usize| fs::read(place.path(&format!("masks/f{}.png", frame + 8))).expect("a mask");
        (0..FRAMES).map(read).collect::<Vec<_>>()
    };
    let expected = masks(&["--threads", "1", "--kernel", "scalar"]);
    assert!(masks(&["--threads", "3"]) == expected);
    assert!(masks(&["--threads", "2", "--context", "1000000", "--radius", "0", "--topk", "1"]) != expected);
}

#[test]
fn frames_that_cannot_be_read_get_the_mask_before_them() {
    let place = place();
    fs::write(place.path("frames/f10.png"), b"not a picture").expect("written");
    let output = place.run(&TRACK);
    expect_code(&output, 0);
    let report = stderr(&output);
    assert!(report.contains("f10.png` gets the mask of the frame before it"), "{report}");
    assert!(report.contains("1 of 9 frames could not be used"), "{report}");
    let read = |name: &str| fs::read(place.path(&format!("masks/{name}.png"))).expect("a mask");
    assert!(read("f10") == read("f9") && read("f11") != read("f9"));
    expect_code(&place.run(&[&TRACK[..], &["--strict"]].concat()), 1);
}

#[test]
fn a_frame_of_another_size_gets_a_mask_of_its_size() {
    let place = place();
    write_png(&place.path("frames/f9.png"), ColorType::Rgb, (64, 48), &[90; 3 * 64 * 48]);
    expect_code(&place.run(&TRACK), 0);
    read_mask(&place.path("masks/f9.png"), (64, 48));
    read_mask(&place.path("masks/f10.png"), SIZE);
}

#[test]
fn one_frame_is_a_sequence_and_a_list_gives_the_order() {
    let place = place();
    fs::write(place.path("list.txt"), "frames/f8.png\n").expect("written");
    let output = place.run(&["track", "small.pass", "@list.txt", "--mask", "first.png", "--out", "masks"]);
    expect_code(&output, 0);
    assert_eq!(read_mask(&place.path("masks/f8.png"), SIZE), truth(0));
    assert_eq!(fs::read_dir(place.path("masks")).expect("masks").count(), 1);
}

#[test]
fn an_object_without_a_patch_is_named() {
    let place = place();
    let mut mask = truth(0);
    mask[0] = 3;
    write_png(&place.path("first.png"), ColorType::Indexed, SIZE, &mask);
    let output = place.run(&TRACK);
    expect_code(&output, 0);
    assert!(stderr(&output).contains("object 3 of `first.png` is too small"), "{}", stderr(&output));
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let place = place();
    let gray = truth(0);
    write_png(&place.path("gray.png"), ColorType::Grayscale, SIZE, &gray);
    write_png(&place.path("empty.png"), ColorType::Indexed, SIZE, &vec![0; SIZE.0 * SIZE.1]);
    write_png(&place.path("small.png"), ColorType::Indexed, (2, 2), &[0, 0, 0, 1]);
    write_png(&place.path("color.png"), ColorType::Indexed, (SIZE.1, SIZE.0), &[9; SIZE.0 * SIZE.1]);
    write_png(&place.path("nocolor.png"), ColorType::Indexed, SIZE, &[9; SIZE.0 * SIZE.1]);
    let half = fs::read(place.path("first.png")).expect("a mask");
    fs::write(place.path("half.png"), &half[..half.len() / 2]).expect("written");
    fs::create_dir(place.path("nothing")).expect("a folder");
    fs::create_dir(place.path("broken")).expect("a folder");
    fs::write(place.path("broken/1.png"), b"no").expect("written");
    fs::create_dir(place.path("twice")).expect("a folder");
    fs::copy(place.path("frames/f8.png"), place.path("twice/1.png")).expect("copied");
    fs::copy(place.path("frames/f8.png"), place.path("twice/1.jpg")).expect("copied");

    let track = |frames: &'static str, mask: &'static str, out: &'static str| {
        vec!["track", "small.pass", frames, "--mask", mask, "--out", out]
    };
    let with = |more: &[&'static str]| [&TRACK[..], more].concat();
    for (arguments, code, parts) in [
        (track("frames", "gray.png", "m"), 1, &["`gray.png`", "shades of gray", "palette", "hint:"][..]),
        (track("frames", "empty.png", "m"), 1, &["`empty.png`", "nothing to follow"]),
        (
            track("frames", "small.png", "m"),
            1,
            &["`small.png`", "2x2 pixels, but the first frame has 128x96"],
        ),
        (track("frames", "color.png", "m"), 1, &["96x128 pixels, but the first frame has 128x96"]),
        (track("frames", "nocolor.png", "m"), 1, &["index 9 has no color: the palette holds 8"]),
        (track("frames", "half.png", "m"), 1, &["`half.png`", "not a whole PNG file"]),
        (track("frames", "missing.png", "m"), 1, &["`missing.png`", "No such file"]),
        (track("missing", "first.png", "m"), 1, &["cannot read `missing`"]),
        (track("nothing", "first.png", "m"), 2, &["`nothing` holds no images", "hint:"]),
        (track("broken", "first.png", "m"), 1, &["first frame `broken/1.png`", "not an image"]),
        (track("twice", "first.png", "m"), 2, &["the same mask", "1.jpg", "1.png"]),
        (track("frames", "first.png", "frames"), 2, &["could replace `frames/f8.png`"]),
        (track("frames", "first.png", "."), 2, &["could replace `first.png`"]),
        (with(&["--overlay", "masks"]), 2, &["the same folder"]),
        (with(&["--overlay", "frames"]), 2, &["could replace"]),
        (with(&["--topk", "0"]), 2, &["top-k"]),
        (with(&["--temperature", "0"]), 2, &["temperature"]),
        (with(&["--kernel", "abacus"]), 2, &["abacus"]),
    ] {
        let output = place.run(&arguments);
        expect_code(&output, code);
        let message = stderr(&output);
        for part in parts {
            assert!(message.contains(part), "{arguments:?}: `{part}` is not in:\n{message}");
        }
        assert!(!place.path("m").exists() && !place.path("masks").exists(), "{arguments:?}");
    }
}
