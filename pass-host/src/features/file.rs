//! A growing `[rows, ..]` array of `f32` as safetensors or npy: bounded memory, complete or not there at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes kept free for the header, whose length must be known before the number of rows is.
const HEADER: usize = 256;
/// Tensor name in a safetensors file.
const TENSOR: &str = "features";

/// A file format told by the ending of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// One tensor called `features`.
    Safetensors,
    /// NumPy.
    Npy,
}

impl FileFormat {
    /// The format of a file name.
    pub fn of(path: &Path) -> Option<Self> {
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

/// A file being written; nothing is at `path` before [`FeatureFile::finish`].
pub(super) struct FeatureFile {
    path: PathBuf,
    temporary: PathBuf,
    format: FileFormat,
    row: Vec<usize>,
    writer: BufWriter<File>,
}

impl Drop for FeatureFile {
    /// Removes what was not finished; after [`FeatureFile::finish`] there is nothing to remove.
    fn drop(&mut self) {
        fs::remove_file(&self.temporary).ok();
    }
}

impl FeatureFile {
    /// Starts a file whose rows have the axes `row`.
    pub(super) fn create(path: &Path, format: FileFormat, row: &[usize]) -> io::Result<Self> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder)?;
        }
        let mut name = std::ffi::OsString::from(".tmp-");
        name.push(path.file_name().unwrap_or_default());
        let temporary = path.with_file_name(name);
        let mut writer = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
        writer.write_all(&[b' '; HEADER])?;
        Ok(Self { path: path.into(), temporary, format, row: row.to_vec(), writer })
    }

    /// Appends whole rows.
    pub(super) fn append(&mut self, values: &[f32]) -> io::Result<()> {
        for value in values {
            self.writer.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    }

    /// Writes the header for `rows` rows, syncs, and moves the file to its place; returns the shape.
    pub(super) fn finish(mut self, rows: usize) -> io::Result<Vec<usize>> {
        let mut shape = vec![rows];
        shape.extend(&self.row);
        self.writer.flush()?;
        let file = self.writer.get_mut();
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&self.format.header(&shape))?;
        file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(name: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        let mut file =
            FeatureFile::create(&path, FileFormat::of(&path).expect("known"), &[2]).expect("create");
        file.append(&[1.0, 2.0]).expect("append");
        file.append(&[3.0, 4.0, 5.0, 6.0]).expect("append");
        assert!(!path.exists(), "nothing is there before it is complete");
        assert_eq!(file.finish(3).expect("finish"), [3, 2]);
        fs::read(&path).expect("read")
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.npy");
        let mut file = FeatureFile::create(&path, FileFormat::Npy, &[2]).expect("create");
        file.append(&[1.0, 2.0]).expect("append");
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn safetensors_reads_back() {
        let bytes = written("a.safetensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
        let tensor = file.tensor(TENSOR).expect("there");
        assert_eq!(tensor.shape(), [3, 2]);
        assert_eq!(tensor.data()[20..], 6f32.to_le_bytes());
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
