//! Which images are bad and why: `quarantine.tsv` of a run, one `path<TAB>reason` a line.
//!
//! An image stays in quarantine for the whole run, also after a resume, so that the same images replace it; deleting
//! its line gives it another chance.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::error::DataError;
use super::index::ImageIndex;

/// Bad images with their reasons.
#[derive(Debug, Default)]
pub struct Quarantine {
    /// By image index.
    bad: BTreeMap<u64, String>,
    file: Option<(PathBuf, File)>,
}

impl Quarantine {
    /// Opens or creates the list at `path`; lines that name images of `index` count, others stay untouched. Without a
    /// path the list is kept in memory only.
    ///
    /// # Errors
    /// [`DataError::Write`] when the file cannot be opened.
    pub fn open(path: Option<&Path>, index: &ImageIndex) -> Result<Self, DataError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let (file, text) =
            open_list(path).map_err(|source| DataError::Write { path: path.to_owned(), source })?;
        let mut reasons: BTreeMap<&str, &str> = BTreeMap::new();
        for line in text.lines() {
            if let Some((name, reason)) = line.split_once('\t') {
                reasons.entry(name).or_insert(reason);
            }
        }
        let mut bad = BTreeMap::new();
        if !reasons.is_empty() {
            for i in 0..index.len() {
                if let Some(&reason) = reasons.get(escape(&index.name(i)).as_str()) {
                    bad.insert(i as u64, reason.to_owned());
                }
            }
        }
        Ok(Self { bad, file: Some((path.to_owned(), file)) })
    }

    /// Adds an image unless it is there already. The line is appended in one write and is on disk afterwards.
    ///
    /// # Errors
    /// [`DataError::Write`] when the file cannot be written.
    pub fn add(&mut self, image: u64, name: &str, reason: &str) -> Result<(), DataError> {
        if self.holds(image) {
            return Ok(());
        }
        let reason = escape(reason);
        if let Some((path, file)) = &mut self.file {
            file.write_all(line(name, &reason).as_bytes())
                .and_then(|()| file.sync_data())
                .map_err(|source| DataError::Write { path: path.clone(), source })?;
        }
        self.bad.insert(image, reason);
        Ok(())
    }

    /// Whether an image is in it.
    pub fn holds(&self, image: u64) -> bool {
        self.bad.contains_key(&image)
    }

    /// The bad images, ascending, with their reasons.
    pub fn images(&self) -> impl ExactSizeIterator<Item = (u64, &str)> {
        self.bad.iter().map(|(&image, reason)| (image, reason.as_str()))
    }

    /// Number of distinct bad images.
    pub fn len(&self) -> usize {
        self.bad.len()
    }

    /// Whether no image is bad so far.
    pub fn is_empty(&self) -> bool {
        self.bad.is_empty()
    }
}

/// Opens for appending; a last line that a kill has cut is removed, so that every line is whole.
fn open_list(path: &Path) -> io::Result<(File, String)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    if whole < bytes.len() {
        file.set_len(whole as u64)?;
        file.seek(io::SeekFrom::End(0))?;
        bytes.truncate(whole);
    }
    Ok((file, String::from_utf8_lossy(&bytes).into_owned()))
}

/// The line of one bad image.
pub(crate) fn line(name: &str, reason: &str) -> String {
    format!("{}\t{}\n", escape(name), escape(reason))
}

/// One line, one tab: control characters in names and reasons become spaces.
fn escape(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DataConfig;

    fn index(root: &Path) -> ImageIndex {
        for name in ["a.jpg", "b.jpg", "c.jpg"] {
            std::fs::write(root.join(name), name).unwrap();
        }
        let images = vec![root.to_str().unwrap().to_owned()];
        ImageIndex::build(&DataConfig { images, ..DataConfig::default() }, None).unwrap()
    }

    #[test]
    fn entries_are_written_once_and_survive_a_resume() {
        let dir = tempfile::tempdir().unwrap();
        let index = index(dir.path());
        let path = dir.path().join("quarantine.tsv");
        let mut list = Quarantine::open(Some(&path), &index).unwrap();
        list.add(1, &index.name(1), "first\treason\nof two").unwrap();
        list.add(1, &index.name(1), "another").unwrap();
        let expected = format!("{}\tfirst reason of two\n", index.name(1));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        drop(list);
        std::fs::write(&path, format!("{expected}{}\tcut by a ki", index.name(2))).unwrap();
        let mut list = Quarantine::open(Some(&path), &index).unwrap();
        assert_eq!(list.images().collect::<Vec<_>>(), [(1, "first reason of two")]);
        list.add(1, &index.name(1), "again").unwrap();
        list.add(0, &index.name(0), "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{expected}{}\tnew\n", index.name(0)));
    }
}
