//! Everything a device calls, on inputs the compiler knows nothing about. The panic handler calls a function that exists
//! nowhere: if any panic can be reached from `probe`, the program does not link. It is never run.
#![no_std]
#![no_main]

use core::fmt::Write;
use core::slice;

use pass_edge::image::{Image, PixelOrder, Plane, YuvColor};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::Pool;
use pass_edge::resize::{Filter, Fit, Resize, ResizeScratch};
use pass_edge::scratch::{Scratch, ScratchLen};
use pass_edge::tracking::{propagate, propagate_scratch_len};
use pass_edge::{features, features_with_pool, scratch_len, self_test};

use pass_core::aggregation::{AggregationHead, mean_into};
use pass_core::class_attention::{ClassAttention, ClassAttentionParameters};
use pass_core::frame;
use pass_core::layers::LayerNorm;
use pass_core::matching::{Matches, match_into, match_scratch_len};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::propagation::{
    Clip, ClipShape, Propagation, one_hot_into, resize_nearest_into, segment_into, segment_scratch_len,
};
use pass_core::shape::{PatchGrid, Tokens};

// memcpy and the like
#[cfg(target_os = "linux")]
#[link(name = "c")]
unsafe extern "C" {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn a_panic_is_reachable() -> !;
    }
    // SAFETY: never linked, so never called.
    unsafe { a_panic_is_reachable() }
}

/// Every kernel of the architecture, whatever the processor has.
fn kernels() -> impl Iterator<Item = Kernel> {
    // SAFETY: never run.
    #[cfg(target_arch = "x86_64")]
    let more = unsafe {
        use pass_edge::kernels::{Avx2, Avx512Vnni, AvxVnni};
        [
            Kernel::Avx2(Avx2::assume()),
            Kernel::AvxVnni(AvxVnni::assume()),
            Kernel::Avx512Vnni(Avx512Vnni::assume()),
        ]
    };
    // SAFETY: never run.
    #[cfg(target_arch = "aarch64")]
    let more = unsafe {
        use pass_edge::kernels::{DotProd, I8mm};
        [Kernel::Neon, Kernel::DotProd(DotProd::assume()), Kernel::I8mm(I8mm::assume())]
    };
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let more = [Kernel::Scalar];
    Kernel::available().chain(more)
}

/// Slices of the caller: pointer and length, as C has them.
#[repr(C)]
pub struct Buffer<T> {
    start: *mut T,
    len: usize,
}

impl<T> Buffer<T> {
    /// # Safety
    /// `len` elements are valid from `start` on.
    unsafe fn slice<'a>(&self) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { slice::from_raw_parts_mut(self.start, self.len) }
    }
}

/// All that a device hands in.
#[repr(C)]
pub struct Inputs {
    file: Buffer<u8>,
    frame: Buffer<u8>,
    chroma: Buffer<u8>,
    size: [usize; 2],
    stride: usize,
    order: u8,
    floats: Buffer<f32>,
    words: Buffer<i16>,
    bytes: Buffer<i8>,
    out: Buffer<f32>,
    resize_words: Buffer<i32>,
    resize_bytes: Buffer<u8>,
    rgb: Buffer<u8>,
    fit: u8,
    kernel: usize,
    trusted: bool,
    threads: extern "C" fn() -> usize,
    run: extern "C" fn(*mut core::ffi::c_void, usize),
    print: extern "C" fn(*const u8, usize),
    sizes: [usize; 8],
    weights: [Buffer<f32>; 18],
    clip: [Buffer<f32>; 4],
    indices: Buffer<u32>,
}

impl Pool for Inputs {
    fn threads(&self) -> usize {
        (self.threads)()
    }

    fn run(&self, parts: &mut [&mut (dyn FnMut() + Send)]) {
        (self.run)(parts.as_mut_ptr().cast(), parts.len());
    }
}

impl Write for &Inputs {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        (self.print)(text.as_ptr(), text.len());
        Ok(())
    }
}

// SAFETY: never run.
unsafe impl Sync for Inputs {}

/// # Safety
/// The buffers are valid and apart from each other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn probe(inputs: &Inputs) -> u64 {
    // SAFETY: the caller's promise.
    match unsafe { run(inputs) } {
        Ok(sum) => sum,
        Err(error) => {
            let _ = inputs.write_error(&error);
            0
        }
    }
}

impl Inputs {
    fn write_error(&self, error: &pass_edge::Error) -> core::fmt::Result {
        let mut text = self;
        write!(text, "{error}")
    }
}

unsafe fn run(inputs: &Inputs) -> pass_edge::Result<u64> {
    // SAFETY: the caller's promise.
    let (file, frame, chroma, floats, words, bytes, out) = unsafe {
        (
            inputs.file.slice(),
            inputs.frame.slice(),
            inputs.chroma.slice(),
            inputs.floats.slice(),
            inputs.words.slice(),
            inputs.bytes.slice(),
            inputs.out.slice(),
        )
    };
    let model = Model::from_bytes(file)?;
    let model = if inputs.trusted { Model::from_verified_bytes(file)? } else { model };
    let (size, stride) = (inputs.size.into(), inputs.stride);
    let frame = match inputs.order {
        0 => Image::new(frame, size, stride, PixelOrder::Rgb)?,
        1 => Image::new(frame, size, stride, PixelOrder::Bgr)?,
        2 => Image::new(frame, size, stride, PixelOrder::Gray)?,
        order => {
            let color = if order == 3 { YuvColor::Bt601 } else { YuvColor::Bt709Full };
            Image::nv12(Plane { bytes: frame, stride }, Plane { bytes: chroma, stride }, size, color)?
        }
    };
    let Some(kernel) = kernels().nth(inputs.kernel) else { return Ok(0) };
    let fit = match inputs.fit {
        0 => Fit::Stretch,
        1 => Fit::Cover,
        _ => Fit::CenterCrop,
    };
    let filter = if inputs.trusted { Filter::Bicubic } else { Filter::Bilinear };
    // SAFETY: the caller's promise.
    let (words_of_resize, bytes_of_resize, rgb) =
        unsafe { (inputs.resize_words.slice(), inputs.resize_bytes.slice(), inputs.rgb.slice()) };
    let resize = Resize::new(size, model.architecture().image_size(), fit, filter)?;
    let mut memory = ResizeScratch { words: words_of_resize, bytes: bytes_of_resize };
    let image = resize.resize_into(&frame, kernel, &mut memory, rgb)?;
    let len = ScratchLen::with_threads(model.architecture(), inputs.threads());
    let mut scratch = Scratch::new(len, floats, words, bytes)?;
    features_with_pool(&model, &image, kernel, inputs, &mut scratch, out)?;
    let mut scratch = Scratch::new(scratch_len(&model), floats, words, bytes)?;
    features(&model, &frame, kernel, &mut scratch, out)?;
    self_test::verify(&model, kernel, &mut scratch, out)?;

    let mut sum = self_test::digest(out) ^ u64::from(model.contract().images) ^ model.output_len() as u64;
    let floats_of_file = model.block_cosines().chain(model.self_test_feature());
    sum ^= u64::from(floats_of_file.sum::<f32>().to_bits());
    sum ^= model.name().len() as u64 ^ u64::from(model.normalization().mean[0].to_bits());
    if let Some((mean, basis)) = model.pca() {
        sum ^= u64::from(mean.chain(basis).sum::<f32>().to_bits());
    }
    // SAFETY: the caller's promise.
    unsafe { on_top(inputs, kernel)? };
    Ok(sum)
}

/// What a device does with features: matching, aggregation, labels along a video.
unsafe fn on_top(inputs: &Inputs, kernel: Kernel) -> pass_edge::Result<()> {
    // SAFETY: the caller's promise.
    let (floats, out, indices, mask, rgb) = unsafe {
        (
            inputs.floats.slice(),
            inputs.out.slice(),
            inputs.indices.slice(),
            inputs.frame.slice(),
            inputs.rgb.slice(),
        )
    };
    // SAFETY: the caller's promise.
    let [features, labels, scratch, soft] = [0, 1, 2, 3].map(|index| unsafe { inputs.clip[index].slice() });
    let [height, width, dim, k, classes, heads, side, count] = inputs.sizes;
    let grid = PatchGrid::new(height, width)?;
    let tokens = Tokens::new(floats, grid.n_patches(), dim)?;

    let (window, border) = match inputs.fit {
        0 => (Window::Side(side), Border::Wrap),
        1 => (Window::Side(side), Border::Clip),
        _ => (Window::All, Border::Wrap),
    };
    let place = Neighborhood::new(grid, window, border)?;
    let _ = place.list::<8>(count)?.len();
    let _ = match_scratch_len(&place);
    match_into(tokens, &place, k, scratch, indices)?;
    let matches = Matches::new(indices, grid.n_patches(), k)?;
    mean_into(tokens, matches, out)?;
    let mut next = 0;
    let parameters = ClassAttentionParameters::from_fn(|_| {
        next += 1;
        // SAFETY: the caller's promise.
        inputs.weights.get(next - 1).map_or(&[][..], |weights| unsafe { weights.slice() })
    });
    let block = ClassAttention::new(parameters, heads)?;
    block.forward_into(tokens, soft, scratch, out, labels)?;
    let blocks = [block, block];
    let head =
        AggregationHead::new(soft, &blocks, LayerNorm::new(parameters.norm1_weight, parameters.norm1_bias)?)?;
    let _ = head.scratch_len(grid.n_patches());
    head.class_into(tokens, scratch, out)?;
    head.aggregate_into(tokens, matches, scratch, out)?;

    let size = frame::prepared_size(inputs.size.into(), side)?;
    frame::resize_bilinear_into(mask, inputs.size.into(), 3, size, rgb)?;
    frame::normalize_into(rgb, frame::MEAN, frame::STD, out)?;
    let rule = Propagation { previous_frames: count, radius: side, top_k: k, ..Propagation::DAVIS };
    let shape = ClipShape::new(rule, grid, dim, classes)?;
    resize_nearest_into(mask, inputs.size.into(), (height, width), rgb)?;
    one_hot_into(rgb, classes, soft)?;
    let mut clip = Clip::new(shape, features, labels, tokens, soft)?;
    clip.set_target(tokens)?;
    let _ = propagate_scratch_len(&shape, inputs);
    propagate(&clip, kernel, inputs, scratch, soft)?;
    clip.propagate_into(k..count, scratch, soft)?;
    clip.keep_target(soft)?;
    let _ = segment_scratch_len(grid, classes);
    segment_into(soft, grid, classes, side, inputs.size.into(), scratch, rgb)?;
    Ok(())
}
