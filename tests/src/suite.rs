//! A golden test binary as a table: one test per file, and one that refuses files nobody checks.

use crate::golden::Golden;

/// Runs the check of one file and asserts that it covered every entry.
///
/// # Panics
/// When the check fails or leaves an entry out.
pub fn run(file: &str, check: fn(&Golden)) {
    let golden = Golden::open();
    check(&golden);
    golden.assert_covered(file);
}

/// Declares the tests `golden::NAME`, each running the function `NAME(&Golden)` and asserting that the whole file is
/// covered, and `golden::no_file_is_unknown`. Files under `elsewhere` are covered by another binary.
#[macro_export]
macro_rules! golden_suite {
    (elsewhere: [$($other:literal),* $(,)?]; $($check:ident: $file:literal),+ $(,)?) => {
        mod golden {
            $(
                #[test]
                fn $check() {
                    $crate::suite::run($file, super::$check);
                }
            )+

            #[test]
            fn no_file_is_unknown() {
                $crate::Golden::open().assert_files_known(&[$($file,)+ $($other,)*]);
            }
        }
    };
}
