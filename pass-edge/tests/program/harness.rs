//! A folder with a tiny model in it, and the program started there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pass_edge::format::Architecture;
use tempfile::TempDir;

use crate::random_vit::FloatVit;

/// Four patches of 8 × 8 pixels, a class token.
pub(crate) const TINY: Architecture = Architecture {
    dim: 32,
    depth: 2,
    heads: 2,
    hidden: 64,
    patch_size: 8,
    grid: (2, 2),
    class_token: true,
    register_tokens: 0,
    final_norm: true,
    layer_scale_folded: false,
    pca_components: 0,
};

/// A temporary folder with `tiny.pass` in it.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("tiny.pass"), model()).expect("a model");
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `pass-edge ARGUMENTS`, started in the folder; by the emulator that `PASS_EDGE_RUNNER` names, if any.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let program = program();
        let mut command = match std::env::var_os("PASS_EDGE_RUNNER") {
            None => Command::new(program),
            Some(runner) => {
                let mut command = Command::new(runner);
                command.arg(program);
                command
            }
        };
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Runs to the end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program starts")
    }

    /// Names of all files in the folder.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).expect("a folder");
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let mut names: Vec<_> = entries.map(|entry| name(entry.expect("an entry"))).collect();
        names.sort();
        names
    }
}

/// The program, which lies above the folder of this test. Cargo's own variable for it has a `-` in its name, which a
/// compiler started by a shell script (the cross toolchain's) does not get to see.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    test.ancestors().nth(2).expect("a folder").join(format!("pass-edge{}", std::env::consts::EXE_SUFFIX))
}

/// The bytes of `tiny.pass`.
pub(crate) fn model() -> Vec<u8> {
    FloatVit::random(TINY, 3).quantized()
}

/// A photo from the fixtures.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts the exit code, showing what was printed.
#[track_caller]
pub(crate) fn expect_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stdout:\n{}\nstderr:\n{}", stdout(output), stderr(output));
}
