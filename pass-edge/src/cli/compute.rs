//! How features are computed: the flags every computing command has, and a model with all it needs to run.

use std::sync::Arc;

use clap::Args;
use pass_edge::image::Image;
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::{MOST_THREADS, Pool, Threads};
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::{features_with_pool, self_test};

use super::error::Error;
use super::footprint;

/// Every kernel of every processor, by its name on the command line.
const KERNELS: [&str; 8] = ["auto", "scalar", "avx2", "avx_vnni", "avx512_vnni", "neon", "dotprod", "i8mm"];

/// Threads and kernel; the same flags for every command that computes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct ComputeArgs {
    /// Threads [default: one per core, at most 16]. The result is the same for any number.
    #[arg(long, value_name = "N", value_parser = thread_count)]
    threads: Option<usize>,
    /// Instructions: `auto` (the fastest here), scalar, avx2, avx_vnni, avx512_vnni, neon, dotprod, or i8mm. The result
    /// is the same with any.
    #[arg(long, value_name = "KERNEL", default_value = "auto", value_parser = KERNELS, hide_possible_values = true)]
    kernel: String,
}

fn thread_count(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|threads| (1..=MOST_THREADS).contains(threads))
        .ok_or_else(|| format!("expected a number from 1 to {MOST_THREADS}"))
}

impl ComputeArgs {
    /// Threads to compute with.
    pub(super) fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores).min(MOST_THREADS)
    }

    /// The same, started.
    pub(super) fn pool(&self) -> Result<Arc<Threads>, Error> {
        Ok(Arc::new(Threads::new(self.threads())?))
    }

    /// The kernel asked for.
    pub(super) fn kernel(&self) -> Result<Kernel, Error> {
        if self.kernel == "auto" {
            return Ok(Kernel::best());
        }
        Kernel::available().find(|kernel| kernel.name() == self.kernel).ok_or_else(|| {
            let available: Vec<_> = Kernel::available().map(Kernel::name).collect();
            Error::usage(
                format!("`--kernel {}`: this processor or this build does not have it", self.kernel),
                format!("available here: auto, {}", available.join(", ")),
            )
        })
    }
}

/// A model, a kernel, threads and the memory they need, taken once.
#[derive(Debug)]
pub(super) struct Engine<'m> {
    model: Model<'m>,
    kernel: Kernel,
    threads: Arc<Threads>,
    scratch_len: ScratchLen,
    scratch: ScratchBuffer,
    out: Vec<f32>,
}

impl<'m> Engine<'m> {
    /// Takes the memory; what ran up to here is not needed any more.
    pub(super) fn new(model: Model<'m>, kernel: Kernel, threads: Arc<Threads>) -> Self {
        footprint::forget_startup_code();
        let scratch_len = ScratchLen::with_threads(model.architecture(), threads.threads());
        Self {
            model,
            kernel,
            threads,
            scratch_len,
            scratch: ScratchBuffer::new(scratch_len),
            out: vec![0.0; model.output_len()],
        }
    }

    /// The model.
    pub(super) fn model(&self) -> &Model<'m> {
        &self.model
    }

    /// Another kernel from now on.
    pub(super) fn use_kernel(&mut self, kernel: Kernel) {
        self.kernel = kernel;
    }

    /// Bytes of working memory.
    pub(super) fn scratch_bytes(&self) -> usize {
        self.scratch_len.total_bytes()
    }

    /// Features of an image of the model's size, `[N + P, D]`.
    pub(super) fn features(&mut self, image: &Image<'_>) -> pass_edge::Result<&[f32]> {
        let Self { model, kernel, threads, scratch, out, .. } = self;
        threads
            .install(|| features_with_pool(model, image, *kernel, &**threads, &mut scratch.scratch(), out))?;
        Ok(out)
    }

    /// The model's self-test.
    pub(super) fn verify(&mut self) -> pass_edge::Result<()> {
        let Self { model, kernel, threads, scratch, out, .. } = self;
        threads
            .install(|| self_test::verify_with_pool(model, *kernel, &**threads, &mut scratch.scratch(), out))
    }
}
