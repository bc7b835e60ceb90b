//! Standard output for results, standard error for everything else; colors only on a terminal.

use std::error::Error as _;
use std::io::Write;
use std::path::Path;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::checkpoint::write_atomically;
use crate::error::Error;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();

/// Prints an error with its causes and its hint on standard error.
pub fn print_error(error: &Error) {
    let mut text = format!("{ERROR}error:{ERROR:#} {error}\n");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!("  caused by: {error}\n");
        cause = error.source();
    }
    if let Some(hint) = error.hint() {
        text += &format!("\n{HINT}hint:{HINT:#} {hint}\n");
    }
    // nobody is left to tell if standard error is gone
    write!(anstream::stderr().lock(), "{text}").ok();
}

/// A line for the person on standard error.
pub(super) fn note(line: &str) {
    writeln!(anstream::stderr().lock(), "{line}").ok();
}

/// A line of warning on standard error.
pub(super) fn warn(line: &str) {
    note(&format!("{WARNING}warning:{WARNING:#} {line}"));
}

/// A warning for each image that could not be used.
pub(super) fn warn_left_out(bad: &[(String, String)]) {
    for (name, reason) in bad {
        warn(&format!("left out `{name}`: {reason}"));
    }
}

/// A bar with images done, speed and time left on standard error; nothing where that is no terminal.
pub(super) fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{bar:20.cyan} {pos}/{len} images  {per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// A bar with a message and steps done on standard error; nothing where that is no terminal.
pub(super) fn steps_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:20.cyan} {pos}/{len} {msg}  {eta} left") {
        bar.set_style(style);
    }
    bar
}

/// Text on standard output, as it is.
pub(super) fn print(text: &str) -> Result<(), Error> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // `pass-host config show demo | head` is fine
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Error::Output),
    }
}

/// A result: the table for people, and one JSON object to a file, or instead of the table to standard output (`-`).
pub(super) fn report(json: Option<&Path>, report: &impl Serialize, table: &str) -> Result<(), Error> {
    match json {
        Some(path) if path == Path::new("-") => return print_json(report),
        Some(path) => {
            let text = serde_json::to_string_pretty(report).map_err(|e| Error::Output(e.into()))?;
            write_atomically(path, format!("{text}\n").as_bytes())?;
        }
        None => {}
    }
    print(table)
}

/// One JSON object on standard output.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::Output(e.into()))?;
    text.push('\n');
    print(&text)
}
