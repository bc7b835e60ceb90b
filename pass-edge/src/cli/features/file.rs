//! A growing `[rows, ..]` array of `f32` as safetensors or npy, laid out as `pass-host features` does, with a list of
//! names beside it: bounded memory, complete or not there at all.

use std::fs;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use crate::cli::draft::Draft;

/// Bytes kept free for the header, whose length must be known before the number of rows is.
const HEADER: usize = 256;
/// Tensor name in a safetensors file.
const TENSOR: &str = "features";

/// A file format told by the ending of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileFormat {
    /// One tensor called `features`.
    Safetensors,
    /// NumPy.
    Npy,
}

impl FileFormat {
    /// The format of a file name.
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "safetensors" => Some(Self::Safetensors),
            "npy" => Some(Self::Npy),
            _ => None,
        }
    }

    fn header(self, shape: &[usize]) -> Vec<u8> {
        let sides: Vec<String> = shape.iter().map(usize::to_string).collect();
        let mut header = match self {
            Self::Safetensors => {
                let bytes = 4 * shape.iter().product::<usize>();
                let text = format!(
                    "{{\"{TENSOR}\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[0,{bytes}]}}}}",
                    sides.join(",")
                );
                let mut header = ((HEADER - 8) as u64).to_le_bytes().to_vec();
                header.extend(text.bytes());
                header
            }
            Self::Npy => {
                let mut header = b"\x93NUMPY\x01\x00".to_vec();
                header.extend(((HEADER - 10) as u16).to_le_bytes());
                let text =
                    format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({},), }}", sides.join(", "));
                header.extend(text.bytes());
                header
            }
        };
        header.resize(HEADER, b' ');
        if self == Self::Npy {
            header[HEADER - 1] = b'\n';
        }
        header
    }
}

/// A file being written; nothing is at its path before [`FeatureFile::finish`].
pub(super) struct FeatureFile {
    format: FileFormat,
    row: Vec<usize>,
    rows: usize,
    values: Draft,
    names: Option<Draft>,
}

impl FeatureFile {
    /// Starts a file whose rows have the axes `row`; with names, their list is `F.images.txt`.
    pub(super) fn create(path: &Path, format: FileFormat, row: &[usize], names: bool) -> io::Result<Self> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder)?;
        }
        let mut values = Draft::create(path.to_owned())?;
        values.writer.write_all(&[b' '; HEADER])?;
        let names = if names { Some(Draft::create(path.with_extension("images.txt"))?) } else { None };
        Ok(Self { format, row: row.to_vec(), rows: 0, values, names })
    }

    /// Appends a row.
    pub(super) fn append(&mut self, name: Option<&str>, values: &[f32]) -> io::Result<()> {
        for value in values {
            self.values.writer.write_all(&value.to_le_bytes())?;
        }
        if let (Some(names), Some(name)) = (&mut self.names, name) {
            writeln!(names.writer, "{name}")?;
        }
        self.rows += 1;
        Ok(())
    }

    /// Writes the header, syncs, and moves the file and its list to their places; returns the shape.
    pub(super) fn finish(mut self) -> io::Result<Vec<usize>> {
        let mut shape = vec![self.rows];
        shape.extend(&self.row);
        self.values.writer.seek(SeekFrom::Start(0))?;
        self.values.writer.write_all(&self.format.header(&shape))?;
        self.values.sync()?;
        if let Some(mut names) = self.names {
            names.sync()?;
            names.publish()?;
        }
        self.values.publish()?;
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn written(name: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        let format = FileFormat::of(&path).expect("known");
        let mut file = FeatureFile::create(&path, format, &[2], true).expect("create");
        for (name, values) in [("a", [1.0, 2.0]), ("b", [3.0, 4.0]), ("c", [5.0, 6.0])] {
            file.append(Some(name), &values).expect("append");
        }
        assert!(!path.exists(), "nothing is there before it is complete");
        assert_eq!(file.finish().expect("finish"), [3, 2]);
        let names = fs::read_to_string(path.with_extension("images.txt")).expect("the list");
        assert_eq!(names, "a\nb\nc\n");
        fs::read(&path).expect("read")
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.npy");
        let mut file = FeatureFile::create(&path, FileFormat::Npy, &[2], true).expect("create");
        file.append(Some("a"), &[1.0, 2.0]).expect("append");
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn safetensors_reads_back() {
        let bytes = written("a.safetensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
        let tensor = file.tensor(TENSOR).expect("there");
        assert_eq!(tensor.shape(), [3, 2]);
        assert_eq!(tensor.data()[20..], 6_f32.to_le_bytes());
    }

    #[test]
    fn npy_has_an_aligned_header_and_all_values() {
        let bytes = written("a.npy");
        assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
        let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        assert_eq!((length + 10) % 64, 0);
        assert!(String::from_utf8_lossy(&bytes[10..HEADER]).contains("'shape': (3, 2,)"));
        assert_eq!(bytes.len(), HEADER + 24);
        assert_eq!(bytes[HEADER - 1], b'\n');
    }
}
