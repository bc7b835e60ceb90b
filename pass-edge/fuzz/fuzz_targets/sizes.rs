//! Any architecture, threads, frame and buffers: a valid model of it is written, changed in a few places and run.
//! `cargo fuzz run sizes` in `pass-edge`.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pass_edge::format::{Architecture, Contract, Mode, Normalization};
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::ScopedThreads;
use pass_edge::scratch::{Scratch, ScratchBuffer, ScratchLen};
use pass_edge::writer::{Description, TensorData, write};
use pass_edge::{features, features_with_pool};
use pass_edge_fuzz::read_and_run;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Sizes as they come, or reduced to ones that can be valid.
    small: bool,
    fast: bool,
    sizes: [u32; 7],
    flags: [bool; 3],
    registers: u32,
    numbers: Vec<i8>,
    changes: Vec<(u16, u8)>,
    gray: bool,
    padding: u8,
    /// Elements taken off a buffer: 0 fits.
    missing: [u8; 5],
    threads: u8,
}

impl Input {
    fn architecture(&self) -> Architecture {
        let [dim, depth, heads, hidden, patch_size, rows, columns] = self.sizes;
        let [class_token, final_norm, layer_scale_folded] = self.flags;
        let reduced = |size: u32, most: u32| if self.small { 1 + size % most } else { size };
        let heads = reduced(heads, 2);
        Architecture {
            dim: if self.small { 16 * heads } else { dim },
            depth: reduced(depth, 2),
            heads,
            hidden: if self.small { 16 + 16 * (hidden % 2) } else { hidden },
            patch_size: reduced(patch_size, 3),
            grid: (reduced(rows, 5), reduced(columns, 5)),
            class_token,
            register_tokens: if self.small { self.registers % 3 } else { self.registers },
            final_norm,
            layer_scale_folded,
            pca_components: if self.small { self.registers / 3 % 3 } else { self.registers },
        }
    }

    /// Sometimes one element short.
    fn len(&self, which: usize, len: usize) -> usize {
        len.saturating_sub(usize::from(self.missing[which] % 8 / 7))
    }
}

fuzz_target!(|input: Input| {
    let architecture = input.architecture();
    if architecture.validate().is_err() {
        return;
    }
    let len = ScratchLen::with_threads(&architecture, usize::from(input.threads));
    assert!(len.total_bytes() > 0);
    if !input.small {
        return;
    }
    let mode = if input.fast { Mode::Fast } else { Mode::Exact };
    let numbers = if input.numbers.is_empty() { &[1][..] } else { &input.numbers };
    let description = Description {
        name: "fuzzed",
        architecture,
        normalization: Normalization { mean: [0.5; 3], std: [0.25; 3] },
        mode,
        contract: Contract {
            images: 0,
            images_hash: 0,
            mean_cosine: 1.0,
            first_percentile: 1.0,
            min_cosine: 0.0,
        },
        self_test_seed: 1,
    };
    let limit = mode.weight_limit();
    let mut shift = 0;
    let file = write(&description, &mut |name, rows, columns| {
        shift += 1;
        let numbers = numbers.iter().copied().cycle().skip(shift % numbers.len()).take(rows * columns);
        if name.ends_with(".weight") && !name.contains("norm") {
            TensorData::Int8(numbers.map(|number| number.clamp(-limit, limit)).collect())
        } else {
            TensorData::F32(numbers.map(|number| f32::from(number) / 64.0).collect())
        }
    });
    let mut file = file.expect("a valid architecture and valid numbers");
    read_and_run(&Model::from_bytes(&file).expect("what was written is read"));
    for (at, value) in &input.changes {
        let at = usize::from(*at) % file.len();
        file[at] = *value;
    }
    let Ok(model) = Model::from_verified_bytes(&file) else { return };
    read_and_run(&model);
    if *model.architecture() != architecture {
        return;
    }

    let (height, width) = architecture.image_size();
    let order = if input.gray { PixelOrder::Gray } else { PixelOrder::Bgr };
    let stride = width * if input.gray { 1 } else { 3 } + usize::from(input.padding % 4);
    let pixels = vec![input.padding; input.len(0, height * stride)];
    let Ok(image) = Image::new(&pixels, (height, width), stride, order) else { return };
    let threads = usize::from(input.threads % 4);
    let len = ScratchLen::with_threads(&architecture, threads.max(1));
    let mut floats = vec![f32::NAN; input.len(1, len.floats)];
    let mut words = vec![i16::MIN; input.len(2, len.words)];
    let mut bytes = vec![i8::MIN; input.len(3, len.bytes)];
    let mut out = vec![f32::NAN; input.len(4, model.output_len())];
    let fits = floats.len() == len.floats && words.len() == len.words && bytes.len() == len.bytes;
    let scratch = Scratch::new(len, &mut floats, &mut words, &mut bytes);
    assert_eq!(scratch.is_ok(), fits);
    let Ok(mut scratch) = scratch else { return };
    let done = if threads > 1 {
        features_with_pool(&model, &image, Kernel::best(), &ScopedThreads(threads), &mut scratch, &mut out)
    } else {
        features(&model, &image, Kernel::best(), &mut scratch, &mut out)
    };
    assert_eq!(done.is_ok(), out.len() == model.output_len());
    if done.is_err() {
        return;
    }
    let mut again = vec![0.0; model.output_len()];
    let mut scratch = ScratchBuffer::new(ScratchLen::of(&architecture));
    features(&model, &image, Kernel::Scalar, &mut scratch.scratch(), &mut again).expect("everything fits");
    let same = out.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same || !again.iter().all(|value| value.is_finite()), "threads or kernel change the features");
});
