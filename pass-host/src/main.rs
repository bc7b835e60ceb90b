//! `pass-host`: the program.
#![deny(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use pass_host::cli::{self, Cli};
use pass_host::distributed::launch;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    set_thread_counts(cli.threads().or_else(launch::fair_threads));
    match cli::run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            cli::print_error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Hands the thread counts to the two pools that read them from the environment when first used: rayon's (products,
/// fused operations) and candle's own, whose spinning threads slow down everything else and get one thread.
#[expect(unsafe_code, reason = "setting an environment variable is unsafe once other threads may read it")]
fn set_thread_counts(threads: Option<usize>) {
    // SAFETY: called from `main` before anything starts a thread; parsing arguments starts none.
    unsafe {
        std::env::set_var("CANDLE_NUM_THREADS", "1");
        if let Some(threads) = threads {
            std::env::set_var("RAYON_NUM_THREADS", threads.to_string());
        }
    }
}
