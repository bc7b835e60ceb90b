//! The classes of a data set: names and colors.

use std::fs;
use std::path::Path;

use super::super::index_png::voc_color;
use super::dataset::Layout;
use super::error::SegmentError;

/// Names and colors, by class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Names.
    pub names: Vec<String>,
    /// Colors, one for each name.
    pub colors: Vec<[u8; 3]>,
}

/// Labels are bytes, and 255 stands for pixels that do not count.
const MOST: usize = 255;

/// The classes of PASCAL VOC, which its folder does not name.
const VOC: [&str; 21] = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
];

impl Classes {
    /// Names with the colors of `palette`; where it ends, those of VOC (its black is kept for a background).
    pub(super) fn new(names: Vec<String>, palette: Vec<[u8; 3]>, has_background: bool) -> Self {
        let shift = u8::from(!has_background);
        let usual = |class: usize| voc_color((class as u8).saturating_add(shift));
        let colors = (0..names.len())
            .map(|class| palette.get(class).copied().unwrap_or_else(|| usual(class)))
            .collect();
        Self { names, colors }
    }

    /// Number of classes.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

/// `names` if there are 1 to 255 of them.
pub(super) fn checked(names: Vec<String>, path: &Path) -> Result<Vec<String>, SegmentError> {
    match (1..=MOST).contains(&names.len()) {
        true => Ok(names),
        false => Err(SegmentError::Classes {
            path: path.into(),
            line: None,
            expected: "1 to 255 classes",
            found: format!("{}", names.len()),
        }),
    }
}

/// The classes a folder names: `classes.txt`, the list of ADE20K, or those of VOC.
pub(super) fn in_folder(dir: &Path, ignore: u8, layout: Layout) -> Result<Vec<String>, SegmentError> {
    for name in ["classes.txt", "objectInfo150.txt"] {
        let path = dir.join(name);
        if path.is_file() {
            return from_file(&path, ignore);
        }
    }
    match layout {
        Layout::Voc => Ok(VOC.map(str::to_owned).to_vec()),
        Layout::Camvid | Layout::Ade20k => Err(SegmentError::NoClasses { dir: dir.into() }),
    }
}

/// The classes of a list: a name a line, or `INDEX NAME` a line (in which the class that does not count is left out),
/// or the table of ADE20K, whose first column counts from 1 and whose last is the name.
pub(super) fn from_file(path: &Path, ignore: u8) -> Result<Vec<String>, SegmentError> {
    let text = fs::read_to_string(path).map_err(|source| SegmentError::Read { path: path.into(), source })?;
    let lines: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    let names = match lines.first() {
        Some((_, head)) if head.starts_with("Idx") => numbered(path, &lines[1..], 1, true, None)?,
        Some((_, first)) if split_number(first).is_some() => numbered(path, &lines, 0, false, Some(ignore))?,
        _ => lines.iter().map(|(_, line)| (*line).to_owned()).collect(),
    };
    checked(names, path)
}

/// A leading number and the rest.
fn split_number(line: &str) -> Option<(usize, &str)> {
    let (number, rest) = line.split_once(|c: char| c.is_whitespace() || c == ':' || c == ',')?;
    Some((number.parse().ok()?, rest.trim()))
}

fn numbered(
    path: &Path,
    lines: &[(usize, &str)],
    first: usize,
    last_column: bool,
    ignore: Option<u8>,
) -> Result<Vec<String>, SegmentError> {
    let mut names = Vec::with_capacity(lines.len());
    for &(line, text) in lines {
        let wrong = |expected| SegmentError::Classes {
            path: path.into(),
            line: Some(line),
            expected,
            found: format!("`{text}`"),
        };
        let (number, rest) =
            split_number(text).ok_or_else(|| wrong("`INDEX NAME`, as in the line before"))?;
        if ignore.is_some_and(|ignore| number == usize::from(ignore)) {
            continue;
        }
        if number != names.len() + first {
            return Err(wrong("numbers that count up one by one"));
        }
        let name = if last_column { rest.rsplit('\t').next().unwrap_or(rest) } else { rest };
        if name.is_empty() {
            return Err(wrong("a name behind the number"));
        }
        names.push(name.trim().to_owned());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str, ignore: u8) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("classes.txt");
        fs::write(&path, text).unwrap();
        from_file(&path, ignore).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_of_three_kinds_are_read() {
        assert_eq!(names("sky\n\ntraffic light\n", 255).unwrap(), ["sky", "traffic light"]);
        assert_eq!(names("0 Sky\n1 Road\n2 Unlabelled\n", 2).unwrap(), ["Sky", "Road"]);
        assert_eq!(names("0: Sky\n1: Road\n", 255).unwrap(), ["Sky", "Road"]);
        let ade =
            "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n2\t0.1\t9\t7\tbuilding, edifice\n";
        assert_eq!(names(ade, 255).unwrap(), ["wall", "building, edifice"]);
    }

    #[test]
    fn broken_lists_name_the_line() {
        assert!(names("0 Sky\n2 Road\n", 255).unwrap_err().contains("line 2"));
        assert!(names("0 Sky\nRoad\n", 255).unwrap_err().contains("line 2"));
        assert!(names("", 255).unwrap_err().contains("1 to 255"));
        assert!(names(&"x\n".repeat(256), 255).unwrap_err().contains("found 256"));
    }

    #[test]
    fn colors_come_from_the_palette_first() {
        let classes = Classes::new(vec!["a".into(), "b".into()], vec![[1, 2, 3]], false);
        assert_eq!(classes.colors, [[1, 2, 3], voc_color(2)]);
        assert_eq!(Classes::new(vec!["a".into()], Vec::new(), true).colors, [[0, 0, 0]]);
    }
}
