use std::path::Path;

use super::format::{ENTRY_BYTES, HEADER_BYTES};
use super::*;

fn image(bytes: &[u8], width: u32, height: u32) -> NewImage {
    NewImage { bytes: bytes.to_vec(), width, height, stored: Stored::Original }
}

/// Three images; one without a name, one without bytes.
fn small(path: &Path) -> Vec<u8> {
    let mut writer = ShardWriter::create(path).unwrap();
    writer.push(b"a/one.jpg", &image(b"first image", 3, 2)).unwrap();
    writer.push(b"", &NewImage { stored: Stored::Raw, ..image(b"2nd", 1, 1) }).unwrap();
    writer.push(b"b.png", &NewImage { stored: Stored::Jpeg, ..image(b"", 65_536, 1) }).unwrap();
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

fn temporary() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    (dir, path)
}

/// Name and bytes of an image, or what is wrong with it.
type Found = Result<(Vec<u8>, Vec<u8>), String>;

/// Everything that can be asked of a shard.
fn contents(file: &[u8]) -> Result<Vec<Found>, ShardError> {
    let shard = Shard::from_bytes(file)?;
    let one = |i| {
        let read = || Ok::<_, ShardError>((shard.entry(i)?.name.to_vec(), shard.image(i)?.to_vec()));
        read().map_err(|error| error.to_string())
    };
    Ok((0..shard.len()).map(one).collect())
}

#[test]
fn what_was_written_is_read() {
    let (dir, path) = temporary();
    let bytes = small(&path);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    let shard = Shard::open(&path).unwrap();
    assert!(is_shard(&path));
    assert_eq!((shard.len(), shard.is_empty()), (3, false));
    let entry = shard.entry(0).unwrap();
    assert_eq!((entry.name, entry.width, entry.height), (&b"a/one.jpg"[..], 3, 2));
    assert_eq!((entry.offset, entry.length), (HEADER_BYTES as u64, 11));
    assert_eq!((shard.image(0).unwrap(), shard.image(1).unwrap()), (&b"first image"[..], &b"2nd"[..]));
    assert_eq!(shard.entry(1).unwrap().stored, Stored::Raw);
    let last = shard.entry(2).unwrap();
    assert_eq!((last.name, last.stored, shard.image(2).unwrap()), (&b"b.png"[..], Stored::Jpeg, &b""[..]));
    assert!(matches!(shard.image(3), Err(ShardError::NoSuchImage { entry: 3, images: 3 })));
    assert_eq!(bytes.len(), HEADER_BYTES + 14 + 14 + 3 * ENTRY_BYTES, "as the table of the format says");
}

#[test]
fn every_changed_byte_is_found_and_what_it_does_not_touch_stays() {
    let (_dir, path) = temporary();
    let sound = small(&path);
    let expected = contents(&sound).unwrap();
    for at in 0..sound.len() {
        for flip in [0x01, 0x80, 0xFF] {
            let mut damaged = sound.clone();
            damaged[at] ^= flip;
            match contents(&damaged) {
                Err(_) => assert!(at < HEADER_BYTES, "byte {at}"),
                Ok(found) => {
                    let wrong = found.iter().filter(|image| image.is_err()).count();
                    assert_eq!(wrong, 1, "byte {at}: one image is damaged");
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!(found.is_err() || found == expected, "byte {at}: damage went unnoticed");
                    }
                }
            }
        }
    }
}

#[test]
fn every_cut_and_every_addition_is_refused() {
    let (_dir, path) = temporary();
    let sound = small(&path);
    for length in 0..sound.len() {
        let error = contents(&sound[..length]).unwrap_err();
        assert!(matches!(error, ShardError::NotAShard | ShardError::Length { .. }), "{length}: {error}");
    }
    let longer = [&sound[..], b"x"].concat();
    assert!(matches!(contents(&longer), Err(ShardError::Length { .. })));
}

/// A file whose checksums are right, whatever else it says: every number of it is replaced by values that overflow, point
/// outside or overlap.
#[test]
fn numbers_that_lie_are_refused_behind_right_checksums() {
    let (_dir, path) = temporary();
    let sound = small(&path);
    let length = sound.len() as u64;
    let values = [0, 1, 79, 80, length - 1, length, length + 1, u64::from(u32::MAX), u64::MAX - 55, u64::MAX];
    for field in 0..6 {
        for value in values {
            let mut file = sound.clone();
            let at = 24 + 8 * field;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let checksum = xxhash_rust::xxh3::xxh3_64(&file[..72]);
            file[72..80].copy_from_slice(&checksum.to_le_bytes());
            if file != sound && field != 5 {
                // the content hash (field 5) is only ever compared
                let error = contents(&file).unwrap_err();
                let told = matches!(error, ShardError::Layout { .. } | ShardError::Length { .. });
                assert!(told, "field {field} = {value}: {error}");
            }
        }
    }
    let entry = sound.len() - 3 * ENTRY_BYTES;
    for at in (0..48).step_by(4) {
        for value in values {
            let mut file = sound.clone();
            if at < 32 && at % 8 == 0 {
                file[entry + at..entry + at + 8].copy_from_slice(&value.to_le_bytes());
            } else {
                file[entry + at..entry + at + 4].copy_from_slice(&(value as u32).to_le_bytes());
            }
            // the checksum covers the name, wherever the entry now says it is
            let name_at = u64::from_le_bytes(file[entry + 24..entry + 32].try_into().unwrap()) as usize;
            let name_length = u32::from_le_bytes(file[entry + 32..entry + 36].try_into().unwrap()) as usize;
            let end = name_at.saturating_add(name_length);
            let name = file.get(name_at..end).unwrap_or_default().to_vec();
            let mut hash = xxhash_rust::xxh3::Xxh3::with_seed(0);
            hash.update(&file[entry..entry + 48]);
            hash.update(&name);
            let checksum = hash.digest().to_le_bytes();
            file[entry + 48..entry + 56].copy_from_slice(&checksum);
            let found = contents(&file).unwrap();
            assert!(found[1].is_ok() && found[2].is_ok());
            if let Ok((name, bytes)) = &found[0] {
                // what is accepted lies within its part: other bytes of names or images, never beyond
                assert!(name.len() <= 14 && bytes.len() <= 14, "field {at} = {value}");
            }
        }
    }
}

#[test]
fn other_versions_are_named() {
    let (_dir, path) = temporary();
    let mut file = small(&path);
    file[16..20].copy_from_slice(&7u32.to_le_bytes());
    let error = contents(&file).unwrap_err();
    assert_eq!(error.to_string(), "the shard has format version 7, this program reads version 1");
    assert!(error.hint().contains("newer"));
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let (dir, path) = temporary();
    std::fs::write(&path, "the old one").unwrap();
    let mut writer = ShardWriter::create(&path).unwrap();
    writer.push(b"a", &image(b"x", 1, 1)).unwrap();
    assert_eq!(ShardWriter::create(&path).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(writer);
    assert_eq!(std::fs::read(&path).unwrap(), b"the old one");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    // what a killed process left is taken over
    std::fs::write(dir.path().join(".tmp-s"), vec![1; 4096]).unwrap();
    assert_eq!(contents(&small(&path)).unwrap().len(), 3);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_content_hash_follows_names_images_and_order() {
    let (_dir, path) = temporary();
    let hash = |images: &[(&[u8], &[u8])]| {
        let mut writer = ShardWriter::create(&path).unwrap();
        images.iter().for_each(|(name, bytes)| writer.push(name, &image(bytes, 1, 1)).unwrap());
        let written = writer.finish().unwrap();
        assert_eq!(Shard::open(&path).unwrap().content_hash(), written.content_hash);
        written.content_hash
    };
    let base = hash(&[(b"a", b"xy"), (b"b", b"z")]);
    assert_eq!(hash(&[(b"a", b"xy"), (b"b", b"z")]), base);
    for other in [
        &[(&b"a"[..], &b"xy"[..]), (b"c", b"z")][..],
        &[(b"a", b"xY"), (b"b", b"z")],
        &[(b"b", b"z"), (b"a", b"xy")],
        &[(b"a", b"xy")],
        &[(b"ab", b"xy"), (b"", b"z")],
    ] {
        assert_ne!(hash(other), base, "{other:?}");
    }
}
