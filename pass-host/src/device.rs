//! Where the numbers are computed: CPU or one CUDA device, and in which precision.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::config::AugmentDevice;
use crate::ops::{self, Uploader};

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA if this program and this machine have it, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this number; without a number that of this process, the first of a process on its own.
    Cuda(Option<usize>),
}

impl DeviceChoice {
    /// The choice of one of several processes on a machine: each takes a device of its own, unless a number was given.
    pub fn of_rank(self, local_rank: usize) -> Self {
        match self {
            Self::Auto if local_rank > 0 && open_cuda(local_rank).is_ok() => Self::Cuda(Some(local_rank)),
            Self::Cuda(None) => Self::Cuda(Some(local_rank)),
            other => other,
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(|n| Self::Cuda(Some(n)))
                .ok_or_else(|| "expected auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(n)) => write!(f, "cuda:{n}"),
        }
    }
}

/// What `--precision` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// bf16 on CUDA, f32 on the CPU.
    #[default]
    Auto,
    /// Everything in f32.
    F32,
    /// Training with activations and products in bf16, weights, losses and norms in f32; CUDA only.
    Bf16,
}

/// The chosen device and precision.
#[derive(Clone, Debug)]
pub struct Compute {
    /// The device.
    pub device: Device,
    /// Element type of activations and products in training; weights, gradients and optimizer stay f32.
    pub dtype: DType,
}

impl Compute {
    /// The device in words, for example `CUDA device 0`.
    pub fn device_name(&self) -> String {
        match self.device.location() {
            candle_core::DeviceLocation::Cpu => "CPU".to_owned(),
            candle_core::DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
            candle_core::DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
        }
    }
}

impl Compute {
    /// Whether crops can be made where they shall be.
    ///
    /// # Errors
    /// [`DeviceError::AugmentOnCpu`] if this device shall make them and cannot.
    pub fn check_augment(&self, augment: AugmentDevice) -> Result<(), DeviceError> {
        if augment == AugmentDevice::Gpu && !ops::kernels_run_on(&self.device) {
            return Err(DeviceError::AugmentOnCpu { device: self.device_name() });
        }
        Ok(())
    }

    /// What carries batches to this device; `None` on a CPU that makes the crops itself.
    ///
    /// # Errors
    /// As [`Self::check_augment`], and [`DeviceError::Refused`].
    pub fn uploader(&self, augment: AugmentDevice) -> Result<Option<Uploader>, DeviceError> {
        self.check_augment(augment)?;
        if augment == AugmentDevice::Cpu && self.device.is_cpu() {
            return Ok(None);
        }
        Uploader::new(&self.device).map(Some).map_err(DeviceError::Refused)
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.device_name(), self.dtype.as_str())
    }
}

/// Why the wished device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Built without CUDA.
    #[error("this program was built without CUDA")]
    NotCompiled,
    /// Built with CUDA, but the device does not answer.
    #[error("CUDA device {index} cannot be used: {reason}")]
    Unusable {
        /// Its number.
        index: usize,
        /// What the driver said.
        reason: String,
    },
    /// bf16 on the CPU.
    #[error("precision bf16 needs a CUDA device; on the CPU it is slower than f32")]
    Bf16OnCpu,
    /// It gave no stream for copies.
    #[error("the device takes no images")]
    Refused(#[source] candle_core::Error),
    /// Crops by a GPU on the CPU.
    #[error("`augment.device` is `gpu`, but training runs on the {device}: expected a CUDA device")]
    AugmentOnCpu {
        /// Where it runs.
        device: String,
    },
}

impl DeviceError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::Refused(_) => return None,
                Self::NotCompiled => {
                    "build with `cargo build --release -p pass-host --features cuda`, or use `--device cpu`"
                }
                Self::Unusable { .. } => "`pass-host doctor` shows what is usable; `--device cpu` always is",
                Self::Bf16OnCpu => "use `--precision f32`, or a CUDA device",
                Self::AugmentOnCpu { .. } => "use `--augment cpu` (the same pixels), or `--device cuda`",
            }
            .into(),
        )
    }
}

/// True if CUDA support was compiled in.
pub const CUDA_COMPILED: bool = cfg!(feature = "cuda");

/// Opens the wished device.
///
/// # Errors
/// [`DeviceError`] if it is not there or does not support the precision; `auto` falls back to the CPU instead.
pub fn choose(device: DeviceChoice, precision: Precision) -> Result<Compute, DeviceError> {
    let device = match device {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda(index) => open_cuda(index.unwrap_or(0))?,
        DeviceChoice::Auto => open_cuda(0).unwrap_or(Device::Cpu),
    };
    let dtype = match precision {
        Precision::Bf16 if device.is_cpu() => return Err(DeviceError::Bf16OnCpu),
        Precision::Auto if device.is_cpu() => DType::F32,
        Precision::F32 => DType::F32,
        Precision::Auto | Precision::Bf16 => DType::BF16,
    };
    Ok(Compute { device, dtype })
}

/// Opens a CUDA device. The driver library is loaded at run time and its absence is a panic inside the binding, which is
/// caught here so that one program serves machines with and without CUDA.
pub fn open_cuda(index: usize) -> Result<Device, DeviceError> {
    if !CUDA_COMPILED {
        return Err(DeviceError::NotCompiled);
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = std::panic::catch_unwind(|| ops::open_cuda(index));
    std::panic::set_hook(hook);
    match opened {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => {
            let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
            Err(DeviceError::Unusable { index, reason })
        }
        Err(_) => {
            Err(DeviceError::Unusable { index, reason: "the CUDA driver library was not found".into() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_parse() {
        let cases = [
            ("auto", Some(DeviceChoice::Auto)),
            ("cpu", Some(DeviceChoice::Cpu)),
            ("cuda", Some(DeviceChoice::Cuda(None))),
            ("cuda:3", Some(DeviceChoice::Cuda(Some(3)))),
            ("cuda:", None),
            ("cuda:-1", None),
            ("gpu", None),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse().ok(), expected, "{text}");
        }
    }

    #[test]
    fn every_rank_has_a_device_of_its_own_unless_one_is_named() {
        assert_eq!(DeviceChoice::Cuda(None).of_rank(2), DeviceChoice::Cuda(Some(2)));
        for choice in [DeviceChoice::Cpu, DeviceChoice::Cuda(Some(1))] {
            assert_eq!(choice.of_rank(2), choice);
        }
        assert_eq!(DeviceChoice::Auto.of_rank(0), DeviceChoice::Auto);
    }

    #[test]
    fn the_cpu_computes_in_f32_only() {
        let compute = choose(DeviceChoice::Cpu, Precision::Auto).unwrap();
        assert_eq!(compute.to_string(), "CPU, f32");
        assert!(matches!(choose(DeviceChoice::Cpu, Precision::Bf16), Err(DeviceError::Bf16OnCpu)));
    }

    #[test]
    fn auto_always_finds_a_device() {
        assert!(choose(DeviceChoice::Auto, Precision::F32).is_ok());
        if !CUDA_COMPILED {
            assert!(matches!(
                choose(DeviceChoice::Cuda(None), Precision::F32),
                Err(DeviceError::NotCompiled)
            ));
        }
    }
}
