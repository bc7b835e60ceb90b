//! The directory of a zip archive whose members are stored as they are, as `torch.save` writes it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use super::error::Problem;

/// How a zip archive starts.
pub(super) const START: &[u8] = b"PK\x03\x04";
const DIRECTORY_ENTRY: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";

/// Bytes of the end record without its comment, of the locator and the record of large archives.
const END_LENGTH: u64 = 22;
const LOCATOR_64_LENGTH: u64 = 20;
const END_64_LENGTH: usize = 56;
/// Bytes of a comment at the most.
const LONGEST_COMMENT: u64 = 0xffff;
/// Bytes of the directory; a checkpoint of a hundred thousand tensors has a tenth of it.
const LARGEST_DIRECTORY: u64 = 1 << 27;
/// What a 32-bit field holds when the value is in the extra field of large archives.
const ELSEWHERE: u32 = u32::MAX;

/// A member of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Where its bytes are in the file.
    pub(super) bytes: Range<u64>,
    /// CRC-32 of them.
    pub(super) crc: u32,
}

/// The members by name. Every range lies inside the file.
pub(super) fn members(file: &mut File) -> Result<BTreeMap<String, Member>, Problem> {
    let length = file.seek(SeekFrom::End(0)).map_err(Problem::Read)?;
    let (start, size) = directory(file, length)?;
    let end = start.checked_add(size).filter(|end| *end <= length && size <= LARGEST_DIRECTORY);
    if end.is_none() {
        return Err(damaged("its directory lies outside the file"));
    }
    let directory = read_at(file, start, size)?;
    let mut fields = Fields(&directory);
    let mut members = BTreeMap::new();
    while !fields.0.is_empty() {
        let (name, member) = entry(&mut fields, file, length)?;
        if members.insert(name.clone(), member).is_some() {
            return Err(Problem::Duplicate { what: "members of the archive", name });
        }
    }
    Ok(members)
}

/// Start and size of the directory.
fn directory(file: &mut File, length: u64) -> Result<(u64, u64), Problem> {
    let tail_start = length.saturating_sub(END_LENGTH + LONGEST_COMMENT);
    let tail = read_at(file, tail_start, length - tail_start)?;
    let Some(at) = tail.windows(END.len()).rposition(|window| window == END) else {
        return Err(Problem::Cut { found: length, expected: None });
    };
    let short = || damaged("its end record is short");
    let mut end = Fields(&tail[at + END.len()..]);
    end.skip(8).ok_or_else(short)?;
    let (size, start) = (end.u32().ok_or_else(short)?, end.u32().ok_or_else(short)?);
    let comment = end.u16().ok_or_else(short)?;
    end.skip(comment.into()).ok_or_else(short)?;
    let locator = (tail_start + at as u64).checked_sub(LOCATOR_64_LENGTH);
    let Some(locator) = locator else { return Ok((start.into(), size.into())) };
    let locator = read_at(file, locator, LOCATOR_64_LENGTH)?;
    let Some(locator) = locator.strip_prefix(LOCATOR_64) else { return Ok((start.into(), size.into())) };
    let mut locator = Fields(locator);
    locator.skip(4).ok_or_else(short)?;
    let record = locator.u64().ok_or_else(short)?;
    if record.checked_add(END_64_LENGTH as u64).is_none_or(|end| end > length) {
        return Err(damaged("its end record lies outside the file"));
    }
    let record = read_at(file, record, END_64_LENGTH as u64)?;
    let record = record.strip_prefix(END_64).ok_or_else(|| damaged("its end record is not there"))?;
    let mut record = Fields(record);
    record.skip(36).ok_or_else(short)?;
    let (size, start) = (record.u64().ok_or_else(short)?, record.u64().ok_or_else(short)?);
    Ok((start, size))
}

/// The next entry of the directory.
fn entry(fields: &mut Fields<'_>, file: &mut File, length: u64) -> Result<(String, Member), Problem> {
    let short = || damaged("its directory ends early");
    if fields.take(4).ok_or_else(short)? != DIRECTORY_ENTRY {
        return Err(damaged("its directory holds something that is no entry"));
    }
    fields.skip(6).ok_or_else(short)?;
    let method = fields.u16().ok_or_else(short)?;
    fields.skip(4).ok_or_else(short)?;
    let crc = fields.u32().ok_or_else(short)?;
    let (packed, size) = (fields.u32().ok_or_else(short)?, fields.u32().ok_or_else(short)?);
    let [name, extra, comment] = [fields.u16(), fields.u16(), fields.u16()];
    let (name, extra, comment) =
        (name.ok_or_else(short)?, extra.ok_or_else(short)?, comment.ok_or_else(short)?);
    fields.skip(8).ok_or_else(short)?;
    let header = fields.u32().ok_or_else(short)?;
    let name = String::from_utf8_lossy(fields.take(name.into()).ok_or_else(short)?).into_owned();
    let extra = fields.take(extra.into()).ok_or_else(short)?;
    fields.skip(comment.into()).ok_or_else(short)?;
    let [size, packed, header] = wide(extra, [size, packed, header]).ok_or_else(short)?;
    if method != 0 || packed != size {
        return Err(Problem::Packed { name });
    }
    let local = read_at(file, header, 30)?;
    let mut local =
        Fields(local.strip_prefix(START).ok_or_else(|| damaged("a member is not where it should be"))?);
    local.skip(22).ok_or_else(short)?;
    let before = [local.u16().ok_or_else(short)?, local.u16().ok_or_else(short)?];
    let start = before.iter().try_fold(header + 30, |sum, part| sum.checked_add(u64::from(*part)));
    let end = start.and_then(|start| start.checked_add(size)).filter(|end| *end <= length);
    match (start, end) {
        (Some(start), Some(end)) => Ok((name, Member { bytes: start..end, crc })),
        _ => Err(damaged("a member reaches beyond the end of the file")),
    }
}

/// Size, packed size and place of a member; those that need 64 bits are in the extra field, in this order.
fn wide(mut extra: &[u8], narrow: [u32; 3]) -> Option<[u64; 3]> {
    let mut wide = narrow.map(u64::from);
    while narrow.contains(&ELSEWHERE) {
        let mut fields = Fields(extra);
        let (kind, length) = (fields.u16()?, fields.u16()?);
        let mut field = Fields(fields.take(length.into())?);
        if kind == 1 {
            for (value, _) in wide.iter_mut().zip(narrow).filter(|(_, narrow)| *narrow == ELSEWHERE) {
                *value = field.u64()?;
            }
            break;
        }
        extra = fields.0;
    }
    Some(wide)
}

/// `size` bytes from `start`; both must be known to lie in the file, or the error says where it ends.
fn read_at(file: &mut File, start: u64, size: u64) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.take(size).read_to_end(&mut bytes));
    match read.map_err(Problem::Read)? as u64 == size {
        true => Ok(bytes),
        false => Err(damaged("a member is not where it should be")),
    }
}

fn damaged(what: &'static str) -> Problem {
    Problem::Archive { what }
}

/// Little-endian fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn skip(&mut self, length: usize) -> Option<()> {
        self.take(length).map(|_| ())
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}
