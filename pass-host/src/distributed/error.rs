//! Why several processes cannot work together.

/// An error of the ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistributedError {
    /// Started as one of several, by a program that has no engine for it.
    #[error(
        "this process is rank {rank} of {size} ({variables}), and cannot train with the others: {reason}"
    )]
    NoEngine {
        /// Its rank.
        rank: usize,
        /// Ranks of the job.
        size: usize,
        /// The environment variables that say so.
        variables: &'static str,
        /// What is missing.
        reason: &'static str,
    },
    /// The launcher says something that makes no sense.
    #[error("environment variable `{variable}`: expected {expected}, found {found}")]
    Environment {
        /// The variable.
        variable: String,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// MPI did not start.
    #[error("MPI cannot be used: {reason}")]
    Mpi {
        /// Why.
        reason: String,
    },
    /// The library sees another job than the launcher.
    #[error("the launcher started {expected} ranks ({variables}), but MPI sees {found}")]
    OtherMpi {
        /// Ranks by the environment.
        expected: usize,
        /// The environment variables that say so.
        variables: &'static str,
        /// Ranks by MPI.
        found: usize,
    },
    /// NCCL refused.
    #[error("NCCL cannot be used: {reason}")]
    Nccl {
        /// Why.
        reason: String,
    },
    /// The ranks did not find each other.
    #[error("rank {rank} did not meet the others at {address}")]
    Rendezvous {
        /// Who says so.
        rank: usize,
        /// Host and port.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The thread that talks to the other ranks has ended.
    #[error("the connection to the other ranks is lost")]
    Lost,
    /// What another rank sent cannot be understood: the ranks run different programs.
    #[error("the ranks do not understand each other")]
    Misunderstood(#[from] postcard::Error),
    /// Another rank found the error and reports it.
    #[error("rank {rank} stopped the job and says why")]
    OtherRank {
        /// Which.
        rank: usize,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl DistributedError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::NoEngine { .. } => {
                    "build with `cargo build --release -p pass-host --features mpi` (GPUs: `nccl`), or start one process \
                     without `mpirun`, `srun` and these variables; N processes without an engine would train N times"
                }
                Self::OtherMpi { .. } => {
                    "this program was built with another MPI than the one of the launcher; build it again with that one's \
                     `mpicc` first in `PATH`, or use the other's `mpirun`; with Slurm try `srun --mpi=list`"
                }
                Self::Rendezvous { .. } => {
                    "all ranks need the same MASTER_ADDR (the host of rank 0) and MASTER_PORT, and a network between them"
                }
                Self::Environment { .. } => "launchers set this variable: `mpirun`, `srun` or `torchrun` start ranks",
                Self::Misunderstood(_) => "start the same build of the program on every machine",
                Self::Mpi { .. } | Self::Nccl { .. } => "`pass-host doctor` shows what was built in",
                Self::Lost | Self::OtherRank { .. } | Self::Tensor(_) => return None,
            }
            .into(),
        )
    }
}

impl From<DistributedError> for candle_core::Error {
    fn from(error: DistributedError) -> Self {
        match error {
            DistributedError::Tensor(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
