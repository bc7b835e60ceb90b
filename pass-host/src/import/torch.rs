//! Files of `torch.save`: a pickle that describes tensors, and their values beside it.
//!
//! Since PyTorch 1.6 both are members of a zip archive; before, one follows the other in the file. Either way a tensor is
//! a call of `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, …)` that is read here and never made.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use candle_core::DType;
use flate2::Crc;

use super::error::Problem;
use super::pickle::{Id, Pickle, Value};
use super::tensor_file::{Element, Entries, Entry, Storage, read_range};
use super::zip::{self, Member};

/// How a file without archive starts: a pickle of protocol 2 with a number of ten bytes.
pub(super) const LEGACY_START: &[u8] = b"\x80\x02\x8a\x0a";
/// That number.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The version that follows it.
const LEGACY_VERSION: Option<usize> = Some(1001);
/// Calls around the one that rebuilds a tensor: parameters and subclasses.
const MOST_WRAPPERS: usize = 4;
/// The pickle of an archive.
const PICKLE: &str = "data.pkl";
/// Bytes of the pickle of an archive.
const LARGEST_PICKLE: u64 = 1 << 28;

/// The dictionaries of tensors in an archive.
pub(super) fn archive(file: &mut File) -> Result<BTreeMap<String, Entries>, Problem> {
    let members = zip::members(file)?;
    let missing = || Problem::Member { name: PICKLE.into() };
    let is_pickle =
        |name: &&String| name.strip_suffix(PICKLE).is_some_and(|root| root.is_empty() || root.ends_with('/'));
    let name = members.keys().find(is_pickle).ok_or_else(missing)?;
    let root = name.strip_suffix(PICKLE).unwrap_or_default();
    if let Some(order) = members.get(&format!("{root}byteorder")) {
        let order = member(file, "byteorder", order)?;
        if order != b"little" {
            let found = String::from_utf8_lossy(&order).into_owned();
            return Err(Problem::unexpected("byteorder", "order of bytes", "little", found));
        }
    }
    let bytes = member(file, PICKLE, &members[name])?;
    let pickle = Pickle::read(bytes.as_slice()).map_err(|source| Problem::Pickle { source })?;
    let storage = |key: &str| {
        let member = members.get(&format!("{root}data/{key}"))?;
        Some(Storage { bytes: member.bytes.clone(), crc: Some(member.crc) })
    };
    Description { pickle: &pickle, storage: &storage }.parts()
}

/// The bytes of a small member whose checksum is right.
fn member(file: &mut File, name: &str, member: &Member) -> Result<Vec<u8>, Problem> {
    let size = member.bytes.end - member.bytes.start;
    if size > LARGEST_PICKLE {
        let expected = format!("at most {LARGEST_PICKLE} bytes");
        return Err(Problem::unexpected(name, "length", expected, size.to_string()));
    }
    let bytes = read_range(file, member.bytes.clone())?;
    let mut crc = Crc::new();
    crc.update(&bytes);
    match crc.sum() == member.crc {
        true => Ok(bytes),
        false => Err(Problem::Checksum { name: name.into() }),
    }
}

/// The dictionaries of tensors in a file without archive.
pub(super) fn legacy(file: &mut File) -> Result<BTreeMap<String, Entries>, Problem> {
    let length = file.seek(SeekFrom::End(0)).map_err(Problem::Read)?;
    file.seek(SeekFrom::Start(0)).map_err(Problem::Read)?;
    let mut reader = BufReader::new(&*file);
    let mut next = || Pickle::read(&mut reader).map_err(|source| Problem::Pickle { source });
    let (magic, version, _system) = (next()?, next()?, next()?);
    if magic.get(magic.root()) != &Value::Long(LEGACY_MAGIC.to_vec())
        || version.size(version.root()) != LEGACY_VERSION
    {
        return Err(Problem::NoTensors { start: "another pickle".into() });
    }
    let (pickle, keys) = (next()?, next()?);
    let sizes = element_sizes(&pickle);
    let mut storages = BTreeMap::new();
    let mut at = reader.stream_position().map_err(Problem::Read)?;
    for key in keys.sequence(keys.root()).unwrap_or_default() {
        let Some(key) = keys.text(*key) else {
            return Err(Problem::unexpected("storages", "key", "a string", keys.kind(*key)));
        };
        let mut count = [0; 8];
        reader
            .seek(SeekFrom::Start(at))
            .and_then(|_| reader.read_exact(&mut count))
            .map_err(|_| Problem::Cut { found: length, expected: None })?;
        let size = match sizes.get(key) {
            Some(Ok(size)) => *size,
            Some(Err(kind)) => {
                return Err(Problem::unexpected(key, "kind of storage", "one of PyTorch", kind.clone()));
            }
            None => {
                return Err(Problem::unexpected(
                    key,
                    "storage",
                    "one that a tensor uses",
                    "one of no tensor",
                ));
            }
        };
        let end = u64::from_le_bytes(count).checked_mul(size).and_then(|size| (at + 8).checked_add(size));
        let end =
            end.ok_or_else(|| Problem::unexpected(key, "length", "one that fits a file", "2^64 or more"))?;
        if end > length {
            return Err(Problem::Cut { found: length, expected: Some(end) });
        }
        storages.insert(key.to_owned(), Storage { bytes: at + 8..end, crc: None });
        at = end;
    }
    Description { pickle: &pickle, storage: &|key| storages.get(key).cloned() }.parts()
}

/// Bytes of an element by the key of the storage, or the name of a kind that is not known.
fn element_sizes(pickle: &Pickle) -> BTreeMap<String, Result<u64, String>> {
    let size = |identity: Id| {
        let [_, kind, key, ..] = pickle.tuple(identity)? else { return None };
        let (_, kind) = pickle.global(*kind)?;
        Some((
            pickle.text(*key)?.to_owned(),
            element(kind).map(|(_, size)| size).ok_or_else(|| kind.to_owned()),
        ))
    };
    pickle.persistent().filter_map(size).collect()
}

/// What the storages of a class hold, and the bytes of one element.
fn element(kind: &str) -> Option<(Element, u64)> {
    let float = |dtype: DType| Some((Element::Float(dtype), dtype.size_in_bytes() as u64));
    let other = |name: &str, size| Some((Element::Other(name.into()), size));
    match kind {
        "FloatStorage" => float(DType::F32),
        "DoubleStorage" => float(DType::F64),
        "HalfStorage" => float(DType::F16),
        "BFloat16Storage" => float(DType::BF16),
        "LongStorage" => other("int64", 8),
        "IntStorage" => other("int32", 4),
        "ShortStorage" => other("int16", 2),
        "CharStorage" => other("int8", 1),
        "ByteStorage" => other("uint8", 1),
        "BoolStorage" => other("bool", 1),
        "ComplexFloatStorage" => other("complex64", 8),
        "ComplexDoubleStorage" => other("complex128", 16),
        _ => None,
    }
}

/// A pickle and where the storages are that it names.
struct Description<'a> {
    pickle: &'a Pickle,
    storage: &'a dyn Fn(&str) -> Option<Storage>,
}

impl Description<'_> {
    /// The tensors at the top, and those of the dictionaries there.
    fn parts(&self) -> Result<BTreeMap<String, Entries>, Problem> {
        let Value::Dict(items) = self.pickle.get(self.pickle.root()) else {
            return Err(Problem::NoStateDict { found: self.pickle.kind(self.pickle.root()) });
        };
        let mut parts: BTreeMap<String, Entries> = BTreeMap::new();
        for (key, value) in items {
            let Some(key) = self.pickle.text(*key) else { continue };
            if let Some(entry) = self.tensor(key, *value)? {
                put(parts.entry(String::new()).or_default(), key, entry)?;
            }
            let Value::Dict(items) = self.pickle.get(*value) else { continue };
            for (name, value) in items {
                let Some(name) = self.pickle.text(*name) else { continue };
                if let Some(entry) = self.tensor(name, *value)? {
                    put(parts.entry(key.into()).or_default(), name, entry)?;
                }
            }
        }
        Ok(parts)
    }

    /// The tensor that the value `id` describes, if it describes one.
    fn tensor(&self, name: &str, id: Id) -> Result<Option<Entry>, Problem> {
        let Some(arguments) = self.rebuilding(id) else { return Ok(None) };
        let malformed = || {
            Problem::unexpected(
                name,
                "description",
                "a storage, an offset, a shape and strides",
                "something else",
            )
        };
        let [storage, offset, shape, strides, ..] = arguments else { return Err(malformed()) };
        let Value::Persistent(identity) = self.pickle.get(*storage) else { return Err(malformed()) };
        let identity = self.pickle.tuple(*identity).ok_or_else(malformed)?;
        let [_, kind, key, _, _, view @ ..] = identity else { return Err(malformed()) };
        let (_, kind) = self.pickle.global(*kind).ok_or_else(malformed)?;
        let key = self.pickle.text(*key).ok_or_else(malformed)?;
        let sizes = |id: Id| -> Option<Vec<usize>> {
            self.pickle.sequence(id)?.iter().map(|item| self.pickle.size(*item)).collect()
        };
        // a storage that is a stretch of another one: (key, first element, length), in old files only
        let first = match view.first().map(|view| self.pickle.get(*view)) {
            Some(Value::Tuple(view)) => {
                view.get(1).and_then(|first| self.pickle.size(*first)).ok_or_else(malformed)?
            }
            _ => 0,
        };
        let offset =
            self.pickle.size(*offset).and_then(|offset| offset.checked_add(first)).ok_or_else(malformed)?;
        Ok(Some(Entry {
            shape: sizes(*shape).ok_or_else(malformed)?,
            strides: sizes(*strides).ok_or_else(malformed)?,
            offset,
            element: element(kind).map_or_else(|| Element::Other(kind.into()), |(element, _)| element),
            storage: (self.storage)(key).ok_or_else(|| Problem::Member { name: format!("data/{key}") })?,
        }))
    }

    /// The arguments of the call that would rebuild a tensor, inside of those that make it a parameter.
    fn rebuilding(&self, mut id: Id) -> Option<&[Id]> {
        for _ in 0..MOST_WRAPPERS {
            let Value::Object { callable, arguments } = self.pickle.get(id) else { return None };
            let arguments = self.pickle.tuple(*arguments)?;
            match self.pickle.global(*callable)? {
                ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => return Some(arguments),
                ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                    id = *arguments.first()?
                }
                ("torch._tensor", "_rebuild_from_type_v2") => {
                    let [function, _, arguments, ..] = arguments else { return None };
                    return match self.pickle.global(*function)? {
                        ("torch._utils", "_rebuild_tensor_v2") => self.pickle.tuple(*arguments),
                        _ => None,
                    };
                }
                _ => return None,
            }
        }
        None
    }
}

fn put(entries: &mut Entries, name: &str, entry: Entry) -> Result<(), Problem> {
    match entries.insert(name.to_owned(), entry) {
        Some(_) => Err(Problem::Duplicate { what: "tensors", name: name.into() }),
        None => Ok(()),
    }
}
