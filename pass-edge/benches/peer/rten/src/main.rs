//! Milliseconds, load time and memory of rten on an ONNX file: `pass-peer-rten MODEL.onnx ROUNDS`, one JSON line.
//! `RTEN_NUM_THREADS` sets the threads.

use std::error::Error;
use std::time::Instant;

use rten::Model;
use rten_tensor::NdTensor;
use rten_tensor::prelude::*;

/// A line of /proc/self/status in MB.
fn memory_mb(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or_default() / 1024.0
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: pass-peer-rten MODEL.onnx ROUNDS")?;
    let rounds: usize = arguments.next().ok_or("usage: pass-peer-rten MODEL.onnx ROUNDS")?.parse()?;
    let before = memory_mb("VmRSS");
    let start = Instant::now();
    let model = Model::load_file(path)?;
    let load = start.elapsed().as_secs_f64() * 1e3;
    let image = NdTensor::<f32, 4>::from_fn([1, 3, 224, 224], |index| {
        (index.iter().sum::<usize>() % 17) as f32 / 8.0 - 1.0
    });
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let start = Instant::now();
        model.run_one(image.view().into(), None)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let (median, best) = (times[rounds / 2], times[0]);
    let memory = memory_mb("VmHWM") - before;
    println!(
        "{{\"median_ms\": {median:.2}, \"best_ms\": {best:.2}, \"load_ms\": {load:.1}, \"memory_mb\": {memory:.1}}}"
    );
    Ok(())
}
