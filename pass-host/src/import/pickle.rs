//! Python's pickle format as plain data: a stack machine that builds values and never imports, makes or calls anything.
//!
//! Whatever a pickle would call stays an [`Value::Object`] that names the callable and its arguments. Values live in one
//! list and point to each other by index, so that shared and circular ones cost nothing and nothing here recurses.
//! Opcodes: protocols 2 to 5 of CPython's `pickletools`, without those that `torch.save` cannot write.

use std::collections::HashMap;
use std::io::{self, BufRead, Read};

/// Values of one pickle; the largest released checkpoints have below a hundred thousand.
const MOST_VALUES: usize = 1 << 22;
/// Bytes of one pickle, strings included.
const MOST_BYTES: u64 = 1 << 28;
/// Bytes of the name of a class or its module.
const LONGEST_NAME: u64 = 1 << 10;

/// The place of a value in its [`Pickle`].
pub(super) type Id = usize;

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// A whole number of more than 64 bits: little-endian two's complement.
    Long(Vec<u8>),
    Float,
    Text(String),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Set,
    Dict(Vec<(Id, Id)>),
    /// A class or function, by name only.
    Global {
        module: String,
        name: String,
    },
    /// What calling `callable` with `arguments` would give. It is never called.
    Object {
        callable: Id,
        arguments: Id,
    },
    /// Something stored outside the pickle, by what identifies it.
    Persistent(Id),
}

/// Why bytes are no pickle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PickleError {
    /// The bytes end in the middle.
    #[error("it ends in the middle")]
    Ends,
    /// The file cannot be read.
    #[error(transparent)]
    Read(io::Error),
    /// An opcode that `torch.save` does not write.
    #[error("unknown opcode {0:#04x}")]
    Opcode(u8),
    /// More values are taken from the stack than there are.
    #[error("a value is taken from an empty stack")]
    EmptyStack,
    /// An opcode that needs a mark finds none.
    #[error("a mark is missing")]
    NoMark,
    /// A remembered value that was never stored.
    #[error("value {0} is asked for but was never remembered")]
    Memo(u64),
    /// Items are put into something that holds none.
    #[error("items are put into a value that holds none")]
    NoContainer,
    /// A key without a value.
    #[error("a key has no value")]
    OddItems,
    /// The name of a class that is none.
    #[error("the name of a class is no text of at most {LONGEST_NAME} bytes")]
    Name,
    /// Sizes no released file comes near.
    #[error("more than {MOST_VALUES} values or {MOST_BYTES} bytes")]
    TooLarge,
}

impl From<io::Error> for PickleError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Ends,
            _ => Self::Read(error),
        }
    }
}

/// The values of a pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads one pickle, up to and including its end mark.
    pub(super) fn read(reader: impl BufRead) -> Result<Self, PickleError> {
        let mut machine = Machine {
            reader: reader.take(MOST_BYTES),
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        match machine.run() {
            Err(PickleError::Ends) if machine.reader.limit() == 0 => Err(PickleError::TooLarge),
            Err(error) => Err(error),
            Ok(root) => Ok(Self { values: machine.values, root }),
        }
    }

    /// The outermost value.
    pub(super) fn root(&self) -> Id {
        self.root
    }

    /// The value at `id`, which must come from this pickle.
    pub(super) fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    /// What identifies the values stored outside.
    pub(super) fn persistent(&self) -> impl Iterator<Item = Id> {
        self.values.iter().filter_map(|value| match value {
            Value::Persistent(identity) => Some(*identity),
            _ => None,
        })
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number that is a size, a stride or an offset.
    pub(super) fn size(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Value::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// Tuples and lists; torch writes a shape as either.
    pub(super) fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) | Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// Module and name of a class or function.
    pub(super) fn global(&self, id: Id) -> Option<(&str, &str)> {
        match self.get(id) {
            Value::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }

    /// What the value is, for people.
    pub(super) fn kind(&self, id: Id) -> String {
        let kind = match self.get(id) {
            Value::None => "None",
            Value::Bool(_) => "a truth value",
            Value::Int(_) | Value::Long(_) | Value::Float => "a number",
            Value::Text(_) => "a string",
            Value::Bytes => "bytes",
            Value::Tuple(_) => "a tuple",
            Value::List(_) => "a list",
            Value::Set => "a set",
            Value::Dict(_) => "a dictionary",
            Value::Persistent(_) => "a storage",
            Value::Global { module, name } => return format!("the name `{module}.{name}`"),
            Value::Object { callable, .. } => match self.get(*callable) {
                Value::Global { module, name } => return format!("an object of `{module}.{name}`"),
                _ => "an object",
            },
        };
        kind.into()
    }
}

struct Machine<R> {
    reader: io::Take<R>,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<R: BufRead> Machine<R> {
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            let [opcode] = self.bytes()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    self.bytes::<1>()?; // protocol
                }
                0x95 => {
                    self.bytes::<8>()?; // length of the frame
                }
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    self.pop()?;
                }
                b'1' | 0x90 => {
                    self.pop_to_mark()?; // dropped, or put into the set below
                }
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => {
                    let [value] = self.bytes()?;
                    self.push(Value::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.bytes()?);
                    self.push(Value::Int(value.into()))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.bytes()?);
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => {
                    let length = u8::from_le_bytes(self.bytes()?);
                    self.long(length.into())?;
                }
                0x8b => {
                    let length = u32::from_le_bytes(self.bytes()?);
                    self.long(length.into())?;
                }
                b'G' => {
                    self.bytes::<8>()?;
                    self.push(Value::Float)?;
                }
                b'X' | b'T' => {
                    let length = u32::from_le_bytes(self.bytes()?);
                    self.text(length.into())?;
                }
                0x8c | b'U' => {
                    let length = u8::from_le_bytes(self.bytes()?);
                    self.text(length.into())?;
                }
                0x8d => {
                    let length = u64::from_le_bytes(self.bytes()?);
                    self.text(length)?;
                }
                b'B' => {
                    let length = u32::from_le_bytes(self.bytes()?);
                    self.skip(length.into())?;
                }
                b'C' => {
                    let length = u8::from_le_bytes(self.bytes()?);
                    self.skip(length.into())?;
                }
                0x8e | 0x96 => {
                    let length = u64::from_le_bytes(self.bytes()?);
                    self.skip(length)?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let start = self.stack.len().checked_sub(count).ok_or(PickleError::EmptyStack)?;
                    self.above_mark(start)?;
                    let items = self.stack.split_off(start);
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b']' => self.push(Value::List(Vec::new()))?,
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::List(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b'd' => {
                    let items = pairs(&self.pop_to_mark()?)?;
                    self.push(Value::Dict(items))?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![(key, value)])?;
                }
                b'u' => {
                    let items = pairs(&self.pop_to_mark()?)?;
                    self.set(items)?;
                }
                0x8f => self.push(Value::Set)?,
                0x91 => {
                    self.pop_to_mark()?;
                    self.push(Value::Set)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global { module, name })?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(module), Value::Text(name)) = (&self.values[module], &self.values[name])
                    else {
                        return Err(PickleError::Name);
                    };
                    if (module.len().max(name.len()) as u64) > LONGEST_NAME {
                        return Err(PickleError::Name);
                    }
                    let (module, name) = (module.clone(), name.clone());
                    self.push(Value::Global { module, name })?;
                }
                b'R' | 0x81 => self.call()?,
                0x92 => {
                    self.pop()?; // keyword arguments
                    self.call()?;
                }
                b'b' => {
                    // attributes of the object below: no weight is kept there
                    self.pop()?;
                    self.top()?;
                }
                b'Q' => {
                    let identity = self.pop()?;
                    self.push(Value::Persistent(identity))?;
                }
                b'q' => {
                    let slot = u8::from_le_bytes(self.bytes()?);
                    self.remember(slot.into())?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.bytes()?);
                    self.remember(slot.into())?;
                }
                0x94 => self.remember(self.memo.len() as u64)?,
                b'h' => {
                    let slot = u8::from_le_bytes(self.bytes()?);
                    self.recall(slot.into())?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.bytes()?);
                    self.recall(slot.into())?;
                }
                other => return Err(PickleError::Opcode(other)),
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// `length` bytes; memory grows with what is there, not with what is promised.
    fn string(&mut self, length: u64) -> Result<Vec<u8>, PickleError> {
        let mut bytes = Vec::new();
        self.reader.by_ref().take(length).read_to_end(&mut bytes)?;
        match bytes.len() as u64 == length {
            true => Ok(bytes),
            false => Err(PickleError::Ends),
        }
    }

    fn text(&mut self, length: u64) -> Result<(), PickleError> {
        let bytes = self.string(length)?;
        // lone surrogates and strings of Python 2 are no UTF-8, and no names of weights either
        self.push(Value::Text(String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn skip(&mut self, length: u64) -> Result<(), PickleError> {
        if io::copy(&mut self.reader.by_ref().take(length), &mut io::sink())? != length {
            return Err(PickleError::Ends);
        }
        self.push(Value::Bytes)
    }

    fn long(&mut self, length: u64) -> Result<(), PickleError> {
        let bytes = self.string(length)?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let value = match bytes.len() <= 8 {
            true => {
                let mut all = [if negative { 0xff } else { 0 }; 8];
                all[..bytes.len()].copy_from_slice(&bytes);
                Value::Int(i64::from_le_bytes(all))
            }
            false => Value::Long(bytes),
        };
        self.push(value)
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let mut bytes = Vec::new();
        self.reader.by_ref().take(LONGEST_NAME).read_until(b'\n', &mut bytes)?;
        if bytes.pop() != Some(b'\n') {
            let whole = bytes.len() as u64 + 1 >= LONGEST_NAME;
            return Err(if whole { PickleError::Name } else { PickleError::Ends });
        }
        String::from_utf8(bytes).map_err(|_| PickleError::Name)
    }

    fn push(&mut self, value: Value) -> Result<(), PickleError> {
        if self.values.len() >= MOST_VALUES {
            return Err(PickleError::TooLarge);
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    /// Values below the last mark belong to an unfinished container.
    fn above_mark(&self, height: usize) -> Result<(), PickleError> {
        match self.marks.last() {
            Some(mark) if height < *mark => Err(PickleError::EmptyStack),
            _ => Ok(()),
        }
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        let height = self.stack.len().checked_sub(1).ok_or(PickleError::EmptyStack)?;
        self.above_mark(height)?;
        self.stack.pop().ok_or(PickleError::EmptyStack)
    }

    fn top(&self) -> Result<Id, PickleError> {
        self.stack.last().copied().ok_or(PickleError::EmptyStack)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or(PickleError::NoMark)?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::List(list) => list.extend(items),
            // a subclass of list or dict: nothing in it is a weight
            Value::Object { .. } | Value::Set => {}
            _ => return Err(PickleError::NoContainer),
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<(Id, Id)>) -> Result<(), PickleError> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(dict) => dict.extend(items),
            Value::Object { .. } => {}
            _ => return Err(PickleError::NoContainer),
        }
        Ok(())
    }

    /// An object that is never made; dictionaries of the standard library are plain ones.
    fn call(&mut self) -> Result<(), PickleError> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let is_dict = matches!(&self.values[callable], Value::Global { module, name }
            if module == "collections" && ["OrderedDict", "defaultdict"].contains(&name.as_str()));
        let value = match is_dict {
            true => Value::Dict(self.first_items(arguments)),
            false => Value::Object { callable, arguments },
        };
        self.push(value)
    }

    /// `OrderedDict([[key, value], …])`, as Python 2 pickles it; later versions start it empty.
    fn first_items(&self, arguments: Id) -> Vec<(Id, Id)> {
        let Value::Tuple(arguments) = &self.values[arguments] else { return Vec::new() };
        let Some(Value::List(items)) = arguments.first().map(|first| &self.values[*first]) else {
            return Vec::new();
        };
        let pair = |item: &Id| match &self.values[*item] {
            Value::List(pair) | Value::Tuple(pair) if pair.len() == 2 => Some((pair[0], pair[1])),
            _ => None,
        };
        items.iter().filter_map(pair).collect()
    }

    fn remember(&mut self, slot: u64) -> Result<(), PickleError> {
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: u64) -> Result<(), PickleError> {
        let id = *self.memo.get(&slot).ok_or(PickleError::Memo(slot))?;
        self.stack.push(id);
        Ok(())
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, PickleError> {
    match items.as_chunks() {
        (pairs, []) => Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect()),
        _ => Err(PickleError::OddItems),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Pickle, PickleError> {
        Pickle::read(bytes)
    }

    /// `import os; os.system("touch F")` as pickle writes a malicious `__reduce__`.
    const MALICIOUS: &[u8] = b"\x80\x02cposix\nsystem\nX\x07\x00\x00\x00touch F\x85R.";

    #[test]
    fn nothing_is_called() {
        let pickle = read(MALICIOUS).unwrap();
        assert_eq!(pickle.kind(pickle.root()), "an object of `posix.system`");
    }

    #[test]
    fn dictionaries_of_the_standard_library_are_plain_ones() {
        for bytes in [
            &b"\x80\x02}U\x01aK\x01s."[..],
            b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00aK\x01u}b.",
            b"\x80\x02ccollections\nOrderedDict\n]]U\x01aaK\x01aa\x85R.",
            b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R(\x8c\x01aK\x01u.",
        ] {
            let pickle = read(bytes).unwrap();
            let Value::Dict(items) = pickle.get(pickle.root()) else {
                panic!("{}", pickle.kind(pickle.root()));
            };
            let items: Vec<_> = items.iter().map(|(k, v)| (pickle.text(*k), pickle.size(*v))).collect();
            assert_eq!(items, [(Some("a"), Some(1))], "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn shared_and_circular_values_end() {
        // l = []; l.append(l), then a chain of pairs that would be 2^40 values if it were copied
        let pickle = read(b"\x80\x02]q\x00h\x00a.").unwrap();
        assert_eq!(pickle.get(pickle.root()), &Value::List(vec![pickle.root()]));
        let mut chain = b"\x80\x02Nq\x00".to_vec();
        for _ in 0..40 {
            chain.extend(b"h\x00h\x00\x86q\x00");
        }
        chain.push(b'.');
        assert!(read(&chain).unwrap().values.len() < 100);
    }

    #[test]
    fn whole_numbers_of_any_length() {
        for (bytes, expected) in [
            (&b"\x8a\x00."[..], Value::Int(0)),
            (b"\x8a\x01\xff.", Value::Int(-1)),
            (b"\x8a\x02\xff\x00.", Value::Int(255)),
            (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f.", Value::Int(i64::MAX)),
            (b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00.", Value::Long([&[0xff; 8][..], &[0]].concat())),
            (b"J\xfe\xff\xff\xff.", Value::Int(-2)),
        ] {
            let pickle = read(bytes).unwrap();
            assert_eq!(pickle.get(pickle.root()), &expected);
        }
    }

    #[test]
    fn damage_is_named() {
        let text = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        assert_eq!(text(b""), "it ends in the middle");
        assert_eq!(text(b"\x80\x02X\xff\xff\xff\xffabc"), "it ends in the middle");
        assert_eq!(text(b"\x80\x02cos"), "it ends in the middle");
        assert_eq!(text(b"\x80\x02\xfe"), "unknown opcode 0xfe");
        assert_eq!(text(b"."), "a value is taken from an empty stack");
        assert_eq!(text(b"N(0"), "a value is taken from an empty stack");
        assert_eq!(text(b"N(\x85."), "a value is taken from an empty stack");
        assert_eq!(text(b"u"), "a mark is missing");
        assert_eq!(text(b"}(Nu"), "a key has no value");
        assert_eq!(text(b"h\x07"), "value 7 is asked for but was never remembered");
        assert_eq!(text(b"NNa"), "items are put into a value that holds none");
        let long = [b"c".to_vec(), vec![b'a'; 2000], b"\nb\n.".to_vec()].concat();
        assert!(text(&long).contains("at most 1024 bytes"));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
        }

        /// Opcodes only, so that the machine gets further than with any bytes.
        #[test]
        fn random_opcodes_never_panic(
            choices in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
        ) {
            let opcodes = b"N(012\x88\x89)]}\x85\x86\x87tlaedsu\x8f\x90\x91\x93R\x81\x92bQ\x94h\x00q\x00U\x01aK";
            let mut bytes: Vec<u8> = choices.iter().map(|at| opcodes[at.index(opcodes.len())]).collect();
            bytes.push(b'.');
            if let Ok(pickle) = read(&bytes) {
                prop_assert!(!pickle.kind(pickle.root()).is_empty());
            }
        }
    }
}
