//! Who am I: what a launcher says in the environment.

use super::DistributedError;

/// One of several processes, as its launcher numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Number of this process.
    pub rank: usize,
    /// Number of processes, at least 2.
    pub size: usize,
    /// Number of this process on its machine.
    pub local_rank: usize,
    /// Processes on this machine, if the launcher tells.
    pub local_size: Option<usize>,
    /// The variables that were read, for messages.
    pub variables: &'static str,
    /// Whether an MPI or Slurm launcher started it, so that MPI can find the others.
    pub by_mpi: bool,
}

/// The variables of one launcher.
struct Dialect {
    variables: &'static str,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    local_size: &'static str,
    by_mpi: bool,
}

/// In this order: what a person set for this program, then the launchers.
const DIALECTS: [Dialect; 4] = [
    Dialect {
        variables: "RANK, WORLD_SIZE",
        rank: "RANK",
        size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
        by_mpi: false,
    },
    Dialect {
        variables: "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        by_mpi: true,
    },
    Dialect {
        variables: "PMI_RANK, PMI_SIZE",
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
        by_mpi: true,
    },
    Dialect {
        variables: "SLURM_PROCID, SLURM_NTASKS",
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_NTASKS_PER_NODE",
        by_mpi: true,
    },
];

impl Launch {
    /// What the environment says; `None` = a process on its own.
    ///
    /// # Errors
    /// [`DistributedError::Environment`] for values that make no sense.
    pub fn from_environment() -> Result<Option<Self>, DistributedError> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, DistributedError> {
        let number = |name: &str| {
            let Some(text) = variable(name).filter(|text| !text.trim().is_empty()) else { return Ok(None) };
            text.trim().parse::<usize>().map(Some).map_err(|_| DistributedError::Environment {
                variable: name.into(),
                expected: "a whole number, 0 or more".into(),
                found: text,
            })
        };
        let is_set = |name: &str| variable(name).is_some();
        for dialect in &DIALECTS {
            let (Some(rank), Some(size)) = (number(dialect.rank)?, number(dialect.size)?) else { continue };
            if dialect.rank == "SLURM_PROCID" && rank == 0 && variable("SLURM_STEP_ID").is_none() {
                // a batch script has the variables of the whole job; only `srun` starts its tasks
                continue;
            }
            if rank >= size {
                return Err(DistributedError::Environment {
                    variable: dialect.rank.into(),
                    expected: format!("a number below {} ({size})", dialect.size),
                    found: rank.to_string(),
                });
            }
            if size == 1 {
                continue;
            }
            return Ok(Some(Self {
                rank,
                size,
                // without it all ranks are taken to be on one machine
                local_rank: number(dialect.local_rank)?.unwrap_or(rank),
                // Slurm may write `4(x2)` for two machines of four
                local_size: number(dialect.local_size).unwrap_or_default(),
                variables: dialect.variables,
                by_mpi: dialect.by_mpi || DIALECTS.iter().any(|other| other.by_mpi && is_set(other.rank)),
            }));
        }
        Ok(None)
    }
}

/// Compute threads for this process if others of its job run on the same machine: its share of the cores, but not more
/// than it is bound to. `None` = it is alone.
pub fn fair_threads() -> Option<usize> {
    let local_size = Launch::from_environment().ok().flatten()?.local_size?;
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    Some(share_of_cores(machine_cores().unwrap_or(allowed), allowed, local_size))
}

fn share_of_cores(cores: usize, allowed: usize, ranks: usize) -> usize {
    (cores / ranks.max(1)).clamp(1, allowed.max(1))
}

/// Cores of the machine, whatever this process is bound to, where the system tells it.
fn machine_cores() -> Option<usize> {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()? + 1 - first.parse::<usize>().ok()?)
    };
    online.trim().split(',').map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(environment: &[(&str, &str)]) -> Result<Option<Launch>, DistributedError> {
        Launch::read(|name| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into())
        })
    }

    #[test]
    fn every_launcher_is_understood() {
        type Expected = (usize, usize, usize, Option<usize>, bool);
        let cases: [(&[(&str, &str)], Expected); 5] = [
            (
                &[("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")],
                (3, 4, 1, Some(2), false),
            ),
            (
                &[
                    ("OMPI_COMM_WORLD_RANK", "1"),
                    ("OMPI_COMM_WORLD_SIZE", "2"),
                    ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
                    ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
                ],
                (1, 2, 0, Some(1), true),
            ),
            (&[("PMI_RANK", "5"), ("PMI_SIZE", "8")], (5, 8, 5, None, true)),
            (
                &[
                    ("SLURM_PROCID", "0"),
                    ("SLURM_NTASKS", "2"),
                    ("SLURM_LOCALID", "0"),
                    ("SLURM_STEP_ID", "0"),
                    ("SLURM_NTASKS_PER_NODE", "1(x2)"),
                ],
                (0, 2, 0, None, true),
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2")],
                (0, 2, 0, None, true),
            ),
        ];
        for (environment, expected) in cases {
            let launch = read(environment).unwrap().expect("one of several");
            let found = (launch.rank, launch.size, launch.local_rank, launch.local_size, launch.by_mpi);
            assert_eq!(found, expected, "{environment:?}");
        }
    }

    #[test]
    fn a_process_on_its_own_is_not_one_of_several() {
        let batch_script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        let one = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")];
        for environment in
            [&[][..], &[("RANK", "2")], &[("RANK", ""), ("WORLD_SIZE", "")], &batch_script, &one]
        {
            assert_eq!(read(environment).unwrap(), None, "{environment:?}");
        }
        let task = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "8")];
        assert!(read(&task).unwrap().is_some(), "a batch script is never task 1");
    }

    #[test]
    fn nonsense_names_the_variable() {
        for (environment, variable) in [
            ([("RANK", "4"), ("WORLD_SIZE", "4")], "RANK"),
            ([("RANK", "-1"), ("WORLD_SIZE", "4")], "RANK"),
            ([("RANK", "1"), ("WORLD_SIZE", "four")], "WORLD_SIZE"),
        ] {
            let error = read(&environment).unwrap_err().to_string();
            assert!(error.contains(&format!("`{variable}`: expected")), "{error}");
        }
    }

    #[test]
    fn cores_are_shared_but_a_binding_is_kept() {
        assert_eq!(share_of_cores(16, 16, 4), 4, "not bound");
        assert_eq!(share_of_cores(16, 1, 4), 1, "bound to a core");
        assert_eq!(share_of_cores(32, 4, 8), 4, "bound to its four cores");
        assert_eq!(share_of_cores(2, 2, 4), 1, "more ranks than cores");
    }
}
