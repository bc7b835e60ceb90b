//! What the device does at its best: one large matrix product.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};

/// Side of the matrices: large enough to be limited by arithmetic alone.
const CPU_SIDE: usize = 1536;
const GPU_SIDE: usize = 8192;
/// Products are repeated this long, so that clocks and caches settle.
const REPEAT: Duration = Duration::from_millis(1500);
/// And at least this often.
const LEAST: usize = 5;

/// 10¹² operations a second of the fastest of many products.
pub(super) fn tflops(device: &Device, dtype: DType) -> Result<f64> {
    let side = if device.is_cpu() { CPU_SIDE } else { GPU_SIDE };
    let matrix = |low, high| Tensor::rand(low, high, (side, side), device)?.to_dtype(dtype);
    let (a, b) = (matrix(-1f32, 1.0)?, matrix(0f32, 1.0)?);
    let (begin, mut best, mut count) = (Instant::now(), f64::INFINITY, 0);
    while count < LEAST || begin.elapsed() < REPEAT {
        let start = Instant::now();
        a.matmul(&b)?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
        count += 1;
    }
    Ok(2.0 * (side as f64).powi(3) / best / 1e12)
}
