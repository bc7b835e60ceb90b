//! Several processes that train one network. With the feature `mpi` and `mpirun` at hand, the real thing; without the
//! feature, the refusal to let each train alone.

#[cfg_attr(not(feature = "mpi"), expect(dead_code, reason = "the refusal needs less than real ranks"))]
mod program;

#[cfg(not(feature = "mpi"))]
#[test]
fn one_of_several_without_an_engine_is_an_error() {
    use program::{expect_code, finish, stderr, train};

    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let launchers = [
        [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")],
        [("PMI_RANK", "0"), ("PMI_SIZE", "2")],
        [("RANK", "0"), ("WORLD_SIZE", "8")],
        [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")],
    ];
    for variables in launchers {
        let mut command = train(&run, 2, &[], &[]);
        command.envs(variables);
        let output = finish(command);
        expect_code(&output, 1);
        let text = stderr(&output);
        let (rank, size) = (variables[0].1, variables[1].1);
        assert!(text.contains(&format!("rank {rank} of {size} ({}", variables[0].0)), "{text}");
        assert!(text.contains("without the feature `mpi`") && text.contains("hint:"), "{text}");
        assert!(!run.exists(), "nothing was written");
    }
}

#[cfg(feature = "mpi")]
mod mpi {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output, Stdio};
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use candle_core::{DType, Device, Tensor};
    use pass_host::checkpoint::read_tensors;

    use crate::program::{expect_code, finish, latest, metrics, start, stderr, train};

    /// `command` as so many ranks.
    fn ranks(count: usize, command: &Command) -> Command {
        let mut ranks = Command::new("mpirun");
        ranks.args(["--allow-run-as-root", "--oversubscribe", "-np", &count.to_string()]);
        ranks.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
        ranks
    }

    /// The tiny run by so many ranks, eight images a step.
    fn run(out: &Path, count: usize, steps: usize, settings: &[&str], flags: &[&str]) -> Command {
        let batch = format!("optim.batch={}", 8 / count);
        let settings = [&["model.drop_path=0.2", &batch], settings].concat();
        ranks(count, &train(out, steps, &settings, flags))
    }

    #[track_caller]
    fn done(command: Command) -> Output {
        let output = finish(command);
        expect_code(&output, 0);
        output
    }

    fn tensors(run: &Path, part: &str) -> Vec<(String, Tensor)> {
        let path = latest(run).join(format!("{part}.safetensors"));
        read_tensors(&path, &Device::Cpu).expect("tensors").into_iter().collect()
    }

    fn norm(tensor: &Tensor) -> f32 {
        let squares = tensor.sqr().and_then(|squares| squares.sum_all());
        squares.and_then(|sum| sum.to_scalar::<f32>()).expect("a norm").sqrt()
    }

    /// Losses and figures within 1e-4, centers and weights too; biases apart that shift every score alike or come before a
    /// batch normalization: their gradient is rounding, which AdamW magnifies.
    fn assert_agree(run: &Path, reference: &Path) {
        const IDLE: [&str; 5] =
            ["attn.k.bias", "attn.qkv.bias", "projector.0.bias", "projector.3.bias", "predictor.0.bias"];
        let (own, expected) = (metrics(run), metrics(reference));
        assert_eq!(own.len(), expected.len(), "lines of the log");
        for (own, expected) in own.iter().zip(&expected) {
            for (key, value) in expected.as_object().expect("an object") {
                let Some(value) = value.as_f64() else { continue };
                let found = own[key].as_f64().expect("a number");
                assert!((found - value).abs() <= 1e-4 * value.abs(), "{key}: {found}, expected {value}");
            }
        }
        for part in ["student", "teacher", "centers"] {
            for ((name, own), (_, expected)) in tensors(run, part).iter().zip(&tensors(reference, part)) {
                if !IDLE.iter().any(|idle| name.ends_with(idle)) {
                    let single = |tensor: &Tensor| tensor.to_dtype(DType::F32).expect("numbers");
                    let (own, expected) = (single(own), single(expected));
                    let distance = norm(&(&own - &expected).expect("one shape")) / norm(&expected).max(1e-6);
                    assert!(distance < 1e-4, "{part} {name}: {distance}");
                }
            }
        }
    }

    fn bytes(run: &Path) -> Vec<Vec<u8>> {
        let part = |part: &str| fs::read(latest(run).join(format!("{part}.safetensors"))).expect("a file");
        ["student", "teacher", "optimizer", "centers"].map(part).into()
    }

    #[test]
    fn one_two_and_four_ranks_learn_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = |name: &str| folder.path().join(name);
        for count in [1, 2, 4] {
            let output = done(run(&out(&count.to_string()), count, 50, &[], &[]));
            let text = stderr(&output);
            assert_eq!(text.contains(&format!("{count} ranks (MPI)")), count > 1, "{text}");
            assert_eq!(text.matches("step 50/50").count(), 1, "one rank speaks: {text}");
        }
        assert_agree(&out("2"), &out("1"));
        assert_agree(&out("4"), &out("1"));
        done(run(&out("again"), 4, 50, &[], &["--threads", "2"]));
        assert!(bytes(&out("again")) == bytes(&out("4")), "the same ranks give the same bits");
        assert_eq!(metrics(&out("again")), metrics(&out("4")));
    }

    #[test]
    fn batch_norm_keys_and_queues_are_those_of_all_ranks() {
        let folder = tempfile::tempdir().expect("a folder");
        // images that differ and steps that do not jump with the sign of a tiny gradient: rounding is not magnified
        let sizes =
            ["image.hidden=24", "image.out=8", "image.queue=32", "model.init=xavier", "optim.eps=1e-3"];
        for (name, method) in [("moco", ["image.method=moco_v3"]), ("moby", ["image.method=moby"])] {
            let out = |count: usize| folder.path().join(format!("{name}-{count}"));
            for count in [1, 2] {
                done(run(&out(count), count, 12, &[&sizes[..], &method].concat(), &[]));
            }
            assert_agree(&out(2), &out(1));
        }
    }

    /// The processes of `mpirun`, in the order of their ranks.
    fn children(parent: u32) -> Vec<String> {
        let listed =
            Command::new("ps").args(["-o", "pid=", "--ppid", &parent.to_string()]).output().expect("ps");
        String::from_utf8_lossy(&listed.stdout).split_whitespace().map(str::to_owned).collect()
    }

    fn kill(signal: &str, pids: &[String]) {
        assert!(Command::new("kill").arg(signal).args(pids).status().expect("kill").success());
    }

    fn wait_for(path: PathBuf) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !path.exists() {
            assert!(Instant::now() < deadline, "{} never came", path.display());
            sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn three_ranks_go_on_from_the_checkpoint_that_a_killed_one_leaves() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("run");
        let settings = ["checkpoint.every_steps=5"];
        let mut job = start(run(&out, 4, 100_000, &settings, &[]));
        wait_for(out.join("checkpoints/step-00000010"));
        kill("-KILL", &children(job.id())[1..2]);
        assert_ne!(job.wait().expect("mpirun").code(), Some(0));

        let settings = ["checkpoint.every_steps=5", "optim.batch=2"];
        let mut job = start(ranks(3, &train(&out, 100_000, &settings, &["--resume", "auto"])));
        let first = metrics(&out).len();
        wait_for(out.join("checkpoints").join(format!("step-{:08}", (first / 5 + 2) * 5)));
        kill("-TERM", &children(job.id())[2..3]);
        assert_eq!(job.wait().expect("mpirun").code(), Some(0), "one interrupted rank ends all in order");
        let steps: Vec<u64> =
            metrics(&out).iter().map(|line| line["step"].as_u64().expect("a step")).collect();
        assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "no step twice, none missing");
        assert!(latest(&out).ends_with(format!("step-{:08}", steps.len())));
        let text = fs::read_to_string(latest(&out).join("state.json")).expect("the state");
        let state: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(state["batch"], 6);
    }

    #[test]
    fn errors_are_told_once_and_end_all_ranks() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("run");
        let output = finish(run(&out, 2, 2, &["optim.batch=50"], &[]));
        expect_code(&output, 2);
        let text = stderr(&output);
        assert_eq!(text.matches("one batch of 100 (2 ranks of 50)").count(), 1, "{text}");
        assert!(!out.exists());

        // MPI was started for one, the variables speak of another
        let mut alone = train(&out, 2, &[], &[]);
        alone.envs([("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "3")]);
        let output = finish(alone);
        expect_code(&output, 1);
        assert!(stderr(&output).contains("the launcher started 3 ranks"), "{}", stderr(&output));
        assert!(!out.exists());
    }
}
