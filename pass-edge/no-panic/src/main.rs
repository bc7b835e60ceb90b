#![no_std]
#![no_main]

use core::slice;
use pass_edge::format::Architecture;
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::{Pool, Serial};
use pass_edge::scratch::{Scratch, ScratchLen};
use pass_edge::{Error, features, features_with_pool, scratch_len, self_test};

#[cfg(target_os = "linux")]
#[link(name = "c")]
unsafe extern "C" {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn a_panic_is_reachable() -> !;
    }
    unsafe { a_panic_is_reachable() }
}

fn kernels() -> impl Iterator<Item = Kernel> {
    #[cfg(target_arch = "x86_64")]
    let more = unsafe { [Kernel::Avx2(pass_edge::kernels::Avx2::assume()), Kernel::Avx512Vnni(pass_edge::kernels::Avx512Vnni::assume())] };
    #[cfg(target_arch = "aarch64")]
    let more = unsafe { [Kernel::Neon, Kernel::DotProd(pass_edge::kernels::DotProd::assume()), Kernel::I8mm(pass_edge::kernels::I8mm::assume())] };
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let more = [Kernel::Scalar];
    Kernel::available().chain(more)
}

#[unsafe(no_mangle)]
pub extern "C" fn probe(
    file: *const u8, file_len: usize,
    frame: *const u8, frame_len: usize, height: usize, width: usize, stride: usize, order: u8,
    floats: *mut f32, floats_len: usize,
    words: *mut i16, words_len: usize,
    bytes: *mut i8, bytes_len: usize,
    out: *mut f32, out_len: usize,
    kernel: usize,
) -> u64 {
    unsafe {
        run(slice::from_raw_parts(file, file_len), slice::from_raw_parts(frame, frame_len), (height, width), stride, order,
            slice::from_raw_parts_mut(floats, floats_len), slice::from_raw_parts_mut(words, words_len), slice::from_raw_parts_mut(bytes, bytes_len),
            slice::from_raw_parts_mut(out, out_len), kernel).unwrap_or(1)
    }
}

fn run(file: &[u8], frame: &[u8], size: (usize, usize), stride: usize, order: u8, floats: &mut [f32], words: &mut [i16], bytes: &mut [i8], out: &mut [f32], kernel: usize) -> pass_edge::Result<u64> {
    let model = Model::from_bytes(file)?;
    let order = match order { 0 => PixelOrder::Rgb, 1 => PixelOrder::Bgr, _ => PixelOrder::Gray };
    let image = Image::new(frame, size, stride, order)?;
    let mut scratch = Scratch::new(scratch_len(&model), floats, words, bytes)?;
    let Some(kernel) = kernels().nth(kernel) else { return Ok(0) };
    features(&model, &image, kernel, &mut scratch, out)?;
    self_test::verify(&model, kernel, &mut scratch, out)?;
    let mut sum = self_test::digest(out);
    sum ^= model.block_cosines().sum::<f32>().to_bits() as u64;
    sum ^= model.self_test_feature().sum::<f32>().to_bits() as u64;
    sum ^= model.output_len() as u64;
    if let Some((mean, basis)) = model.pca() { sum ^= mean.chain(basis).sum::<f32>().to_bits() as u64; }
    Ok(sum)
}
