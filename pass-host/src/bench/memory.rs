//! Memory of the process, and of the GPU it works on.

use candle_core::Device;

/// The most memory seen on a device.
pub(super) struct Memory {
    device: Device,
    most_bytes: Option<usize>,
}

impl Memory {
    pub(super) fn new(device: &Device) -> Self {
        Self { device: device.clone(), most_bytes: None }
    }

    /// Looks at it now.
    pub(super) fn observe(&mut self) {
        self.most_bytes = self.most_bytes.max(used_bytes(&self.device));
    }

    pub(super) fn device_mb(&self) -> Option<f64> {
        self.most_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20))
    }
}

/// Bytes in use on a GPU, by this process and others.
#[cfg(feature = "cuda")]
fn used_bytes(device: &Device) -> Option<usize> {
    if !device.is_cuda() {
        return None;
    }
    let (free, total) = candle_core::cuda_backend::cudarc::driver::result::mem_get_info().ok()?;
    Some(total - free)
}

#[cfg(not(feature = "cuda"))]
fn used_bytes(_: &Device) -> Option<usize> {
    None
}

/// The most memory this process has had in RAM, in MB of 2²⁰ bytes, where the system tells it as a file.
pub(super) fn peak_resident_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}
