//! `features`: images, folders and streams in; npy, safetensors and JSON lines out.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Output, Stdio};

use pass_edge::features;
use pass_edge::image::{Image, PixelOrder, Plane, YuvColor};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::resize::{Filter, Fit, Resize, ResizeScratch};
use pass_edge::scratch::ScratchBuffer;
use pass_edge::scratch_len;
use serde_json::Value;

use crate::harness::{Place, TINY, expect_code, fixture, model, program, stderr, stdout};
use crate::random_vit::photo;

/// Patches of `TINY`, and their width.
const PATCHES: usize = 4;
const DIM: usize = 32;

/// All tokens of an image, by the library.
fn expected(image: &Image<'_>, fit: Fit) -> Vec<f32> {
    let plan = Resize::new(image.size(), TINY.image_size(), fit, Filter::Bicubic).expect("a size");
    let len = plan.scratch_len();
    let (mut words, mut bytes, mut rgb) = (vec![0; len.words], vec![0; len.bytes], [0; 3 * 16 * 16]);
    let mut scratch = ResizeScratch { words: &mut words, bytes: &mut bytes };
    let image = plan.resize_into(image, Kernel::Scalar, &mut scratch, &mut rgb).expect("resized");
    let file = model();
    let model = Model::from_bytes(&file).expect("valid");
    let mut scratch = ScratchBuffer::new(scratch_len(&model));
    let mut out = vec![0.0; model.output_len()];
    features(&model, &image, Kernel::Scalar, &mut scratch.scratch(), &mut out).expect("computed");
    out
}

fn patches(image: &Image<'_>, fit: Fit) -> Vec<f32> {
    expected(image, fit)[..PATCHES * DIM].to_vec()
}

/// Shape and values of an npy file.
fn npy(bytes: &[u8]) -> (Vec<usize>, Vec<f32>) {
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let data = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8_lossy(&bytes[10..data]).into_owned();
    assert!(header.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': ("), "{header}");
    let shape = header.split(['(', ')']).nth(1).expect("a shape");
    let sides = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
    (sides.map(|side| side.parse().expect("a number")).collect(), numbers(&bytes[data..]))
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn json_lines(output: &Output) -> Vec<Value> {
    stdout(output).lines().map(|line| serde_json::from_str(line).expect("an object")).collect()
}

fn json_numbers(value: &Value) -> Vec<f32> {
    let numbers = value.as_array().expect("a list").iter();
    numbers.map(|number| number.as_f64().expect("a number") as f32).collect()
}

fn photo_png() -> (Vec<u8>, (usize, usize)) {
    let picture = image::open(fixture("odd-images/made/rgb8.png")).expect("an image").into_rgb8();
    let size = (picture.height() as usize, picture.width() as usize);
    (picture.into_raw(), size)
}

/// Runs with `input` on standard input.
fn piped(place: &Place, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = place.command(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    // a program that refuses its arguments does not read
    child.stdin.take().expect("a pipe").write_all(input).ok();
    child.wait_with_output().expect("an end")
}

/// Frames of the model's size.
fn frames(count: u64) -> Vec<Vec<u8>> {
    (0..count).map(|seed| photo(&TINY, seed)).collect()
}

fn rgb(frame: &[u8]) -> Image<'_> {
    Image::new(frame, (16, 16), 48, PixelOrder::Rgb).expect("a frame")
}

#[test]
fn a_folder_becomes_npy_in_sorted_order_and_bad_images_are_left_out() {
    let place = Place::new();
    fs::create_dir_all(place.path("photos/deep")).expect("a folder");
    let copy = |from: &str, to: &str| {
        fs::copy(fixture(from), place.path(to)).expect("copied");
    };
    copy("odd-images/made/rgb8.png", "photos/deep/c.png");
    copy("odd-images/made/truncated-50pct.jpg", "photos/b.jpg");
    copy("odd-images/exif-orientation/Landscape_6.jpg", "photos/a.jpg");
    fs::write(place.path("photos/notes.txt"), b"no image").expect("written");

    let output = place.run(&["features", "tiny.pass", "photos", "--out", "f.npy", "--kernel", "scalar"]);
    expect_code(&output, 0);
    assert_eq!(stdout(&output), "f.npy: [2, 4, 32]\n");
    assert!(stderr(&output).contains("photos/b.jpg`: truncated JPEG"), "{}", stderr(&output));
    assert!(stderr(&output).contains("left out 1 of 3"), "{}", stderr(&output));
    let (shape, values) = npy(&fs::read(place.path("f.npy")).expect("written"));
    assert_eq!(shape, [2, PATCHES, DIM]);
    let (pixels, size) = photo_png();
    let image = Image::new(&pixels, size, 3 * size.1, PixelOrder::Rgb).expect("an image");
    assert_eq!(values[PATCHES * DIM..], patches(&image, Fit::CenterCrop));
    let names = fs::read_to_string(place.path("f.images.txt")).expect("written");
    assert_eq!(names, "photos/a.jpg\nphotos/deep/c.png\n");

    let strict = ["features", "tiny.pass", "photos", "--out", "g.npy", "--strict", "--threads", "2"];
    expect_code(&place.run(&strict), 1);
    assert_eq!(fs::read(place.path("f.npy")).ok(), fs::read(place.path("g.npy")).ok());
}

#[test]
fn safetensors_and_json_lines_hold_the_same_numbers() {
    let place = Place::new();
    let png = fixture("odd-images/made/rgb8.png");
    let png = png.to_str().expect("a path");
    let jpeg = fixture("odd-images/made/baseline-420.jpg");
    let jpeg = jpeg.to_str().expect("a path");
    for (tokens, shape) in [("patch", &[PATCHES, DIM][..]), ("mean", &[DIM]), ("class", &[DIM])] {
        let out = format!("{tokens}.safetensors");
        let arguments = ["features", "tiny.pass", jpeg, png, "--tokens", tokens];
        expect_code(&place.run(&[&arguments[..], &["--out", &out]].concat()), 0);
        let bytes = fs::read(place.path(&out)).expect("written");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
        let tensor = file.tensor("features").expect("there");
        assert_eq!(tensor.shape(), [&[2], shape].concat());

        let output = place.run(&arguments);
        expect_code(&output, 0);
        let lines = json_lines(&output);
        assert_eq!(lines.len(), 2);
        assert_eq!((&lines[1]["index"], &lines[1]["name"]), (&1.into(), &png.into()));
        assert_eq!(lines[0]["shape"], serde_json::json!(shape));
        let all: Vec<f32> = lines.iter().flat_map(|line| json_numbers(&line["features"])).collect();
        assert_eq!(all, numbers(tensor.data()));
    }
    let output = place.run(&["features", "tiny.pass", png, "--pool", "mean"]);
    let (pixels, size) = photo_png();
    let image = Image::new(&pixels, size, 3 * size.1, PixelOrder::Rgb).expect("an image");
    let tokens = patches(&image, Fit::CenterCrop);
    let mean = |channel: usize| tokens.iter().skip(channel).step_by(DIM).sum::<f32>() / PATCHES as f32;
    let found = json_numbers(&json_lines(&output)[0]["features"]);
    assert!(found.iter().enumerate().all(|(channel, value)| (value - mean(channel)).abs() < 1e-5));
}

#[test]
fn rgb_frames_of_the_models_size_are_taken_as_they_are() {
    let place = Place::new();
    let frames = frames(3);
    let mut stream = frames.concat();
    stream.truncate(2 * frames[0].len() + 100);
    let output = piped(&place, &["features", "tiny.pass", "-", "--out", "f.npy", "--fps"], &stream);
    expect_code(&output, 0);
    let message = stderr(&output);
    assert!(
        message.contains("`frame 2`: the stream ends within it: expected 768 bytes, found 100"),
        "{message}"
    );
    assert!(message.contains("all: 2 frames, "), "{message}");
    let (shape, values) = npy(&fs::read(place.path("f.npy")).expect("written"));
    assert_eq!(shape, [2, PATCHES, DIM]);
    let expected = [&frames[0], &frames[1]].map(|frame| patches(&rgb(frame), Fit::Cover)).concat();
    assert_eq!(values, expected);
    assert_eq!(place.files(), ["f.npy", "tiny.pass"]);
}

#[test]
fn frames_of_every_format_and_stride_are_resized() {
    let place = Place::new();
    let (height, width) = (21, 30);
    let bytes = photo(&TINY, 1).repeat(4);
    let gray = Image::new(&bytes, (height, width), 40, PixelOrder::Gray).expect("a frame");
    let bgr = Image::new(&bytes, (height, width), 91, PixelOrder::Bgr).expect("a frame");
    let (luma, chroma) = bytes.split_at(32 * height);
    let nv12 = |color| {
        let planes = (Plane { bytes: luma, stride: 32 }, Plane { bytes: chroma, stride: 32 });
        Image::nv12(planes.0, planes.1, (height, width), color).expect("a frame")
    };
    for (image, length, flags) in [
        (gray, 40 * height, &["--format", "gray", "--stride", "40"][..]),
        (bgr, 91 * height, &["--format", "bgr", "--stride", "91"]),
        (nv12(YuvColor::Bt601), 32 * 32, &["--format", "nv12", "--stride", "32"]),
        (
            nv12(YuvColor::Bt709Full),
            32 * 32,
            &["--format", "nv12", "--stride", "32", "--color", "bt709-full"],
        ),
    ] {
        for (fit, name) in [(Fit::Cover, "cover"), (Fit::CenterCrop, "center"), (Fit::Stretch, "stretch")] {
            let arguments = ["features", "tiny.pass", "-", "--size", "30x21", "--fit", name];
            let output = piped(&place, &[&arguments[..], flags].concat(), &bytes[..length]);
            expect_code(&output, 0);
            let lines = json_lines(&output);
            assert_eq!(lines.len(), 1, "{flags:?}");
            assert_eq!(json_numbers(&lines[0]["features"]), patches(&image, fit), "{flags:?} {name}");
        }
    }
}

#[test]
fn each_frame_is_answered_before_the_next_is_sent_and_a_closed_reader_ends_it_quietly() {
    let place = Place::new();
    let mut command = place.command(&["features", "tiny.pass", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let (mut input, mut output) =
        (child.stdin.take().expect("a pipe"), BufReader::new(child.stdout.take().expect("a pipe")));
    for (index, frame) in frames(3).iter().enumerate() {
        input.write_all(frame).expect("it reads");
        let mut line = String::new();
        output.read_line(&mut line).expect("an answer");
        let line: Value = serde_json::from_str(&line).expect("an object");
        assert_eq!(line["index"], index);
    }
    drop(output);
    while input.write_all(&frames(1)[0]).is_ok() {}
    drop(input);
    let mut message = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut message).expect("text");
    assert_eq!(message, "");
    assert_eq!(child.wait().expect("an end").code(), Some(0));
}

#[test]
fn nothing_usable_leaves_nothing_behind() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).expect("a folder");
    fs::write(place.path("text.jpg"), b"<html>").expect("written");
    let before = place.files();
    for (input, message) in [
        ("text.jpg", "none of 1 could be used; the first: `text.jpg`: not an image of a known format"),
        ("empty", "there are no images or frames"),
        ("absent.jpg", "cannot read `absent.jpg`"),
        ("-", "there are no images or frames"),
    ] {
        let output = place.run(&["features", "tiny.pass", input, "--out", "f.safetensors"]);
        expect_code(&output, 1);
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
        assert_eq!(place.files(), before, "{input}");
    }
}

#[test]
fn impossible_requests_are_refused_before_anything_is_read() {
    let place = Place::new();
    for (arguments, message) in [
        (&["photos", "--out", "f.parquet"][..], ".safetensors or .npy"),
        (&["-", "photos"], "`-` and other inputs"),
        (&["photos", "--size", "4x4"], "`--size` describes raw frames"),
        (&["-", "--size", "0x4"], "expected width and height"),
        (&["-", "--size", "65535x65535"], "megapixels"),
        (&["-", "--stride", "47"], "a row of 16 pixels has 48 bytes"),
        (&["-", "--color", "bt709"], "`--format nv12`"),
        (&["-", "--kernel", "sse9"], "avx512_vnni"),
        (&["photos", "--max-megapixels", "0"], "more than 0"),
        (&[], "INPUT"),
    ] {
        let output = place.run(&[&["features", "tiny.pass"], arguments].concat());
        expect_code(&output, 2);
        assert!(stderr(&output).contains(message), "`{message}` in\n{}", stderr(&output));
    }
    assert_eq!(place.files(), ["tiny.pass"]);
}

/// A stream has no end of its own when a service is stopped: what was computed is kept.
#[cfg(unix)]
#[test]
fn a_stopped_stream_is_a_complete_file() {
    let place = Place::new();
    let mut command = place.command(&["features", "tiny.pass", "-", "--out", "f.npy"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut input = child.stdin.take().expect("a pipe");
    // a pipe holds 64 KiB: when more has been taken, frames have been computed
    input.write_all(&frames(1)[0].repeat(200)).expect("it reads");
    let stop = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(stop.expect("kill starts").success());
    let output = child.wait_with_output().expect("an end");
    drop(input);
    expect_code(&output, 0);
    let (shape, values) = npy(&fs::read(place.path("f.npy")).expect("written"));
    assert!(shape[0] > 0, "{shape:?}");
    assert_eq!(values.len(), shape.iter().product::<usize>());
    assert_eq!(place.files(), ["f.npy", "tiny.pass"]);
}

/// The script that the systemd unit starts.
#[cfg(unix)]
#[test]
fn the_service_pipes_its_source_into_the_program() {
    let place = Place::new();
    fs::write(place.path("frames.rgb"), frames(2).concat()).expect("written");
    let folder = program().parent().expect("a folder").to_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    let start = |source: &str| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/stream");
        let mut command = std::process::Command::new(script);
        command.env("PATH", format!("{}:{path}", folder.display())).current_dir(place.path(""));
        command.env("PASS_EDGE_MODEL", "tiny.pass").env("PASS_EDGE_SOURCE", source);
        command.env("PASS_EDGE_OPTIONS", "--tokens mean --format rgb").output().expect("the script starts")
    };
    let output = start("cat frames.rgb");
    expect_code(&output, 0);
    assert_eq!(json_lines(&output).len(), 2);
    // a source that cannot start is a failure of the service
    expect_code(&start("exit 3"), 1);
}

/// The frame that stays is the frame at work.
#[cfg(target_os = "linux")]
#[test]
fn resident_memory_does_not_grow_with_the_stream() {
    let place = Place::new();
    let mut command = place.command(&["features", "tiny.pass", "-", "--out", "f.npy", "--threads", "2"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().expect("the program starts");
    let mut input = child.stdin.take().expect("a pipe");
    // features of a frame are 512 bytes: 10 MB in all
    input.write_all(&frames(1)[0].repeat(20_000)).expect("it reads");
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("a running process");
    drop(input);
    assert_eq!(child.wait().expect("an end").code(), Some(0));
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("known on Linux");
    let peak: usize = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    let most = model().len() / 1024 + 6 * 1024;
    assert!(peak <= most, "{peak} KiB resident, {most} allowed");
    assert_eq!(npy(&fs::read(place.path("f.npy")).expect("written")).0, [20_000, PATCHES, DIM]);
}
