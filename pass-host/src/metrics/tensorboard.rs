//! TensorBoard event files, scalars only.
//!
//! The format: records of `length: u64 | masked crc32c of the length | data | masked crc32c of the data` (little endian),
//! each holding a protobuf `Event`. Of the protobuf schema these fields are used:
//!
//! ```text
//! Event       { 1: double wall_time   2: int64 step   3: string file_version   5: Summary summary   7: SessionLog }
//! Summary     { 1: repeated Value }       Value { 1: string tag   2: float simple_value }
//! SessionLog  { 1: enum status (START = 1) }
//! ```

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{MetricsError, io};

/// An open event file.
#[derive(Debug)]
pub(super) struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Creates a new event file in `run`. When a run resumes after step `resume`, a session start tells TensorBoard to
    /// drop the events of older files beyond that step.
    pub(super) fn create(run: &Path, resume: Option<u64>) -> Result<Self, MetricsError> {
        let seconds = now() as u64;
        // TensorBoard reads the files of a run in the order of their names
        let (path, file) = (0..)
            .map(|n| run.join(format!("events.out.tfevents.{seconds:010}.{n:04}.pass")))
            .find_map(|path| match OpenOptions::new().append(true).create_new(true).open(&path) {
                Ok(file) => Some(Ok((path, file))),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => None,
                Err(error) => Some(Err(io("create", &path)(error))),
            })
            .expect("the numbers do not end")?;
        let mut events = Self { path, file };
        let mut version = header(0);
        bytes_field(&mut version, 3, b"brain.Event:2");
        events.append(&record(&version))?;
        if let Some(step) = resume {
            let mut start = header(step + 1);
            bytes_field(&mut start, 7, &[1 << 3, 1]);
            events.append(&record(&start))?;
        }
        Ok(events)
    }

    /// Appends one event with all scalars; those that are not finite are left out.
    pub(super) fn write(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<(), MetricsError> {
        let mut event = header(step);
        bytes_field(&mut event, 5, &summary(scalars));
        self.append(&record(&event))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), MetricsError> {
        self.file.write_all(bytes).map_err(io("write", &self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// An `Event` with time and step.
fn header(step: u64) -> Vec<u8> {
    let mut event = vec![1 << 3 | FIXED64];
    event.extend_from_slice(&now().to_le_bytes());
    event.push(2 << 3 | VARINT);
    varint(&mut event, step);
    event
}

fn summary(scalars: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars.iter().filter(|(_, value)| value.is_finite()) {
        let mut entry = Vec::new();
        bytes_field(&mut entry, 1, tag.as_bytes());
        entry.push(2 << 3 | FIXED32);
        entry.extend_from_slice(&(*value as f32).to_le_bytes());
        bytes_field(&mut summary, 1, &entry);
    }
    summary
}

// protobuf wire types
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | BYTES);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Frames an event.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(crc32c(data)).to_le_bytes());
    out
}

/// The rotation and constant by which the format disguises checksums of data that contain checksums.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78).
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc, &byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_rfc_3720() {
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_summary_has_the_bytes_of_the_schema() {
        // written down from the schema: Value { tag: "a", simple_value: 1.5 }
        assert_eq!(summary(&[("a", 1.5), ("b", f64::NAN)]), [0x0A, 8, 0x0A, 1, b'a', 0x15, 0, 0, 0xC0, 0x3F]);
        let mut long = Vec::new();
        varint(&mut long, 300);
        assert_eq!(long, [0xAC, 0x02]);
    }

    #[test]
    fn every_record_carries_valid_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::create(dir.path(), Some(9)).unwrap();
        events.write(10, &[("loss/total", 5.25)]).unwrap();
        Events::create(dir.path(), None).unwrap();
        let bytes = std::fs::read(&events.path).unwrap();
        let mut rest = bytes.as_slice();
        let mut records = 0;
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let sum = |from: usize| u32::from_le_bytes(rest[from..from + 4].try_into().unwrap());
            assert_eq!(sum(8), masked(crc32c(&rest[..8])));
            assert_eq!(sum(12 + length), masked(crc32c(&rest[12..12 + length])));
            rest = &rest[16 + length..];
            records += 1;
        }
        assert_eq!(records, 3, "version, session start, scalars");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "files of one second do not collide");
    }
}
