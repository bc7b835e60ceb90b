//! Where the tests compute: on the CPU, or on the device that `PASS_DEVICE` names (`cuda`, `cuda:1`).
//!
//! The tolerances are the same everywhere: products of `f32` are formed in `f32` on a GPU too.

use std::sync::OnceLock;

use candle_core::Device;
use pass_host::config::OpsKind;
use pass_host::device::{DeviceChoice, Precision, choose};

/// The environment variable that names the device.
pub const DEVICE_VARIABLE: &str = "PASS_DEVICE";

/// The device of all tests of this process.
///
/// # Panics
/// If `PASS_DEVICE` names a device that is not there.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let name = std::env::var(DEVICE_VARIABLE).unwrap_or_else(|_| "cpu".into());
        let choice: DeviceChoice =
            name.parse().unwrap_or_else(|error| panic!("{DEVICE_VARIABLE}={name}: {error}"));
        choose(choice, Precision::F32)
            .unwrap_or_else(|error| panic!("{DEVICE_VARIABLE}={name}: {error}"))
            .device
    })
}

/// Every way to compute an operation: fused (on a GPU: its kernels), composed, and the kernels in the emulator if that
/// was compiled in.
pub fn all_ops() -> Vec<OpsKind> {
    let kinds = vec![OpsKind::Fused, OpsKind::Reference];
    #[cfg(feature = "_emulator")]
    let kinds = if device().is_cpu() { [kinds, vec![OpsKind::Emulated]].concat() } else { kinds };
    kinds
}
