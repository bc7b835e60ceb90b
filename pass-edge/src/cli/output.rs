//! Standard output for results, standard error for everything else; colors only on a terminal.

use std::error::Error as _;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::error::Error;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();

/// Prints an error with its causes and its hint on standard error.
pub(crate) fn print_error(error: &Error) {
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

/// Text on standard output, as it is.
pub(super) fn print(text: &str) -> Result<(), Error> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // `pass-edge info model.pass | head` is fine
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Error::Output),
    }
}

/// One JSON object on standard output.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::Output(error.into()))?;
    text.push('\n');
    print(&text)
}

/// `label  value` lines under each other.
pub(super) fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    rows.iter().map(|(label, value)| format!("{label:width$}  {value}\n")).collect()
}
