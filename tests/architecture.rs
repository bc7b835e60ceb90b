//! Which way the arrows point: each crate's direct dependencies, and what must appear nowhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Names under `[dependencies]` of a manifest.
fn dependencies(package: &str) -> BTreeSet<String> {
    let manifest = read(&format!("{package}/Cargo.toml"));
    let section = manifest.split("\n[").find(|part| part.starts_with("dependencies]")).unwrap_or_default();
    let names = section.lines().skip(1).filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| !name.is_empty() && !name.starts_with('#')).map(str::to_owned).collect()
}

fn expect_dependencies(package: &str, promised: &[&str]) {
    let promised: BTreeSet<String> = promised.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(dependencies(package), promised, "direct dependencies of {package}");
}

#[test]
fn core_depends_on_no_one_but_bounded_lists_and_optional_views() {
    expect_dependencies("pass-core", &["heapless", "matrixmultiply", "ndarray"]);
    for line in [
        "matrixmultiply = { workspace = true, optional = true }",
        "ndarray = { workspace = true, optional = true }",
    ] {
        assert!(read("pass-core/Cargo.toml").contains(line), "must stay optional: {line}");
    }
}

#[test]
fn edge_depends_on_core_and_what_reads_its_file() {
    let library = ["pass-core", "postcard", "serde", "xxhash-rust"];
    let program = [
        "anstream",
        "anstyle",
        "clap",
        "clap_complete",
        "ctrlc",
        "image",
        "jpeg-decoder",
        "libc",
        "memmap2",
        "png",
        "rayon",
        "serde_json",
        "thiserror",
        "walkdir",
        "zune-core",
        "zune-jpeg",
    ];
    expect_dependencies("pass-edge", &[&library[..], &program[..]].concat());
    let manifest = read("pass-edge/Cargo.toml");
    for name in program {
        let line = manifest.lines().find(|line| line.starts_with(&format!("{name} = ")));
        assert!(line.is_some_and(|line| line.contains("optional = true")), "must stay optional: {name}");
    }
}

#[test]
fn gradient_stopping_layers_are_not_in_the_build() {
    // candle-nn's LayerNorm, rms_norm and softmax_last_dim return results without a gradient, silently
    let lock = read("Cargo.lock");
    assert!(!lock.contains("name = \"candle-nn\""), "candle-nn is banned: use pass_host::ops");
    assert!(!lock.contains("name = \"candle-transformers\""), "it pulls in candle-nn");
    assert!(
        read("clippy.toml").contains("apply_op1_no_bwd"),
        "the lint that bans operations without gradient"
    );
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.expect("a folder entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    rust_files(&workspace().join(folder), &mut files);
    assert!(!files.is_empty(), "{folder} holds no sources");
    files.into_iter().map(|path| (path.clone(), fs::read_to_string(path).expect("readable source"))).collect()
}

#[test]
fn core_and_edge_know_no_tensors_clock_or_files() {
    for folder in ["pass-core/src", "pass-edge/src"] {
        for (path, text) in sources(folder) {
            // the program around the library
            if path.ends_with("pass-edge/src/main.rs") || path.to_string_lossy().contains("pass-edge/src/cli")
            {
                continue;
            }
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for word in ["candle", "std::fs", "std::time", "std::net", "rand::"] {
                assert!(!code.contains(word), "{}: `{word}`", path.display());
            }
            // behind the feature `alloc`: files are written, scratch memory is taken from the heap
            let may_allocate =
                ["pass-edge/src/lib.rs", "pass-edge/src/writer.rs", "pass-edge/src/scratch.rs"]
                    .iter()
                    .any(|file| path.ends_with(file));
            for word in ["extern crate alloc", "alloc::"] {
                assert!(may_allocate || !code.contains(word), "{}: `{word}`", path.display());
            }
        }
    }
}

#[test]
fn edge_is_unsafe_in_its_kernels_alone() {
    for (path, text) in sources("pass-edge/src") {
        // the program maps the model file, which no language can promise to stay as it is, and talks to the C library
        let maps = path.ends_with("pass-edge/src/cli/model_file.rs") && text.matches("unsafe {").count() == 1;
        let advises =
            path.ends_with("pass-edge/src/cli/footprint.rs") && text.matches("unsafe {").count() == 4;
        let kernels = path.parent().is_some_and(|folder| folder.ends_with("pass-edge/src/kernels"));
        let kernel = kernels || maps || advises;
        for word in
            ["unsafe {", "unsafe fn", "unsafe impl", "expect(unsafe", "allow(unsafe", "expect(\n    unsafe"]
        {
            assert!(kernel || !text.contains(word), "{}: `{word}`", path.display());
        }
    }
    assert!(read("pass-edge/src/lib.rs").contains("#![deny(unsafe_code)]"));
}

#[test]
fn only_the_command_line_prints() {
    for (path, text) in [sources("pass-host/src"), sources("pass-edge/src")].concat() {
        let name = path.to_string_lossy().replace('\\', "/");
        if name.contains("/cli") || name.ends_with("main.rs") {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for word in ["println!", "eprintln!", "print!(", "dbg!"] {
            assert!(!code.contains(word), "{name}: `{word}` outside cli/");
        }
    }
}

#[test]
fn no_file_is_too_long_to_be_one_room() {
    for folder in ["pass-core/src", "pass-host/src", "pass-edge/src", "tests"] {
        for (path, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(lines <= 900, "{}: {lines} lines: does it hold two nouns?", path.display());
        }
    }
}
