//! Compiles the CUDA kernels: to PTX with the feature `cuda`, as plain C++ for the emulator with `_emulator`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const FOLDER: &str = "src/ops/cuda";
/// Activation types every file is compiled for: name in CUDA, suffix of the module.
const TYPES: [(&str, &str); 2] = [("float", "f32"), ("bf16", "bf16")];

fn main() {
    println!("cargo::rerun-if-changed={FOLDER}");
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let with = |feature: &str| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if with("CUDA") {
        ptx(&out);
    }
    if with("_EMULATOR") {
        emulator(&out);
    }
}

/// The files with kernels, sorted.
fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir(FOLDER).unwrap_or_else(|error| panic!("{FOLDER}: {error}"));
    let paths = entries.map(|entry| entry.expect("a folder entry").path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    paths.sort();
    paths
}

fn stem(path: &Path) -> String {
    path.file_stem().expect("a file has a name").to_string_lossy().into_owned()
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
    assert!(status.success(), "{command:?} failed: {status}");
}

/// One PTX text per file and type, and the table of all of them.
fn ptx(out: &Path) {
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    // PTX of an old architecture runs on every later one: the driver translates it at first use
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into());
    let mut table = String::from("[\n");
    for source in sources() {
        for (cuda, suffix) in TYPES {
            let module = format!("{}_{suffix}", stem(&source));
            let file = out.join(format!("{module}.ptx"));
            run(Command::new(&nvcc)
                .args(["-ptx", "-O3", "-std=c++17", &format!("-arch=compute_{capability}")])
                .args([&format!("-DValue={cuda}"), "-o"])
                .arg(&file)
                .arg(&source));
            writeln!(table, "    ({module:?}, include_str!({file:?})),").expect("a string grows");
        }
    }
    table.push(']');
    fs::write(out.join("ptx.rs"), table).expect("OUT_DIR is writable");
}

/// All kernels in one C++ file, called by module and name.
fn emulator(out: &Path) {
    let here = env::current_dir().expect("cargo starts build scripts in the package").join(FOLDER);
    let include = |name: &str| format!("#include {:?}\n", here.join(name));
    let mut glue = include("prelude.cuh") + &include("emulator/launch.h");
    let mut entries = String::new();
    for source in sources() {
        let text =
            fs::read_to_string(&source).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
        let file = source.file_name().expect("a file has a name").to_string_lossy().into_owned();
        for (cuda, suffix) in TYPES {
            let module = format!("{}_{suffix}", stem(&source));
            write!(glue, "#define Value {cuda}\nnamespace {module} {{\n{}}}\n#undef Value\n", include(&file))
                .expect("a string grows");
            for kernel in text.lines().filter_map(|line| line.strip_prefix("KERNEL ")) {
                let name = kernel.split('(').next().unwrap_or_default();
                let call = format!("emulator::Unpacked<&{module}::{name}>::call");
                writeln!(entries, "    {{{module:?}, {name:?}, {call}}},").expect("a string grows");
            }
        }
    }
    write!(
        glue,
        "static const emulator::Entry ENTRIES[] = {{\n{entries}}};\n\
         extern \"C\" const char* pass_emulate(const char* module, const char* name, const unsigned* grid, \
         const unsigned* block, unsigned shared, void** arguments) {{\n    \
         return emulator::launch(ENTRIES, sizeof ENTRIES / sizeof *ENTRIES, module, name, grid, block, shared, arguments);\n}}\n"
    )
    .expect("a string grows");
    let (file, object, library) =
        (out.join("emulator.cpp"), out.join("emulator.o"), out.join("libpass_emulator.a"));
    fs::write(&file, glue).expect("OUT_DIR is writable");
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".into());
    run(Command::new(compiler)
        .args(["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unused-function", "-c"])
        .arg(&file)
        .arg("-o")
        .arg(&object));
    let _ = fs::remove_file(&library);
    run(Command::new("ar").arg("rcs").arg(&library).arg(&object));
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=pass_emulator");
    println!("cargo::rustc-link-lib=dylib=stdc++");
}
