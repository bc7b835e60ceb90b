use std::fs;
use std::time::{Duration, SystemTime};

use super::*;
use crate::data::shard::{NewImage, ShardWriter, Stored};

fn touch(root: &Path, names: &[&str]) {
    for name in names {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
}

fn config(sources: &[&Path]) -> DataConfig {
    let images = sources.iter().map(|path| path.to_str().unwrap().to_owned()).collect();
    DataConfig { images, ..DataConfig::default() }
}

fn relative_names(index: &ImageIndex, root: &Path) -> Vec<String> {
    let prefix = format!("{}/", root.display());
    (0..index.len()).map(|i| index.name(i).strip_prefix(&prefix).unwrap().to_owned()).collect()
}

fn same(a: &ImageIndex, b: &ImageIndex) -> bool {
    a.manifest_hash() == b.manifest_hash()
        && a.len() == b.len()
        && (0..a.len()).all(|i| a.name(i) == b.name(i))
}

/// A shard of one image a name, whose bytes are the name in capitals.
fn write_shard(path: &Path, names: &[&str]) {
    let mut writer = ShardWriter::create(path).unwrap();
    for name in names {
        let bytes = name.to_uppercase().into_bytes();
        let image = NewImage { bytes, width: 1, height: 1, stored: Stored::Original };
        writer.push(name.as_bytes(), &image).unwrap();
    }
    writer.finish().unwrap();
}

/// Makes folders look old, so that a cache of them may be trusted.
fn age(root: &Path) {
    let past = SystemTime::now() - Duration::from_secs(3600);
    for entry in walkdir::WalkDir::new(root) {
        File::open(entry.unwrap().path()).unwrap().set_modified(past).unwrap();
    }
}

fn write_tar(path: &Path, members: &[(&str, &[u8])]) {
    let mut tar = tar::Builder::new(File::create(path).unwrap());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.finish().unwrap();
}

#[test]
fn folders_are_walked_and_only_images_taken() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    touch(
        root,
        &["b.JPG", "a/z.png", "a/y.webp", "notes.txt", ".hidden.jpg", ".git/x.png", "a/c/1.tiff", "noext"],
    );
    let index = ImageIndex::build(&config(&[root]), None).unwrap();
    assert_eq!(relative_names(&index, root), ["b.JPG", "a/y.webp", "a/z.png", "a/c/1.tiff"]);
    for i in 0..index.len() {
        assert_eq!(index.read(i).unwrap(), relative_names(&index, root)[i].as_bytes());
    }
}

#[test]
fn lists_and_single_files_are_taken_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    touch(root, &["pics/a.jpg", "pics/b.bin", "one.jpg"]);
    fs::write(root.join("list.txt"), "# two\npics/a.jpg\n\n pics/b.bin \n").unwrap();
    let list = format!("@{}", root.join("list.txt").display());
    let sources = DataConfig {
        images: vec![list, root.join("one.jpg").to_str().unwrap().to_owned()],
        ..DataConfig::default()
    };
    let index = ImageIndex::build(&sources, None).unwrap();
    assert_eq!(relative_names(&index, root), ["one.jpg", "pics/a.jpg", "pics/b.bin"]);
    let limited = ImageIndex::build(&DataConfig { limit: 2, ..sources.clone() }, None).unwrap();
    assert_eq!(relative_names(&limited, root), ["one.jpg", "pics/a.jpg"]);

    fs::write(root.join("list.txt"), "pics/a.jpg\npics/gone.jpg\n").unwrap();
    let error = ImageIndex::build(&sources, None).unwrap_err();
    assert!(
        matches!(&error, DataError::ListedMissing { line: 2, path, .. } if path.ends_with("gone.jpg")),
        "{error}"
    );
}

#[test]
fn tars_are_read_from_the_middle_plain_and_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let plain = root.join("p.tar");
    let long = format!("{}/x.png", "d".repeat(180));
    write_tar(&plain, &[("s/b.jpg", b"bee"), ("readme.md", b"no"), ("s/a.jpg", b"ay"), (&long, b"long")]);
    let packed = root.join("q.tar.gz");
    let mut gz = flate2::write::GzEncoder::new(File::create(&packed).unwrap(), flate2::Compression::fast());
    io::copy(&mut File::open(&plain).unwrap(), &mut gz).unwrap();
    gz.finish().unwrap();
    let cache = root.join("run/index.bin");
    let index = ImageIndex::build(&config(&[&packed, &plain]), Some(&cache)).unwrap();
    let expected = [format!("p.tar/{long}"), "p.tar/s/a.jpg".into(), "p.tar/s/b.jpg".into()];
    assert_eq!(relative_names(&index, root)[..3], expected);
    let contents: Vec<_> =
        (0..6).map(|i| String::from_utf8(index.read(i).unwrap().into_owned()).unwrap()).collect();
    assert_eq!(contents, ["long", "ay", "bee", "long", "ay", "bee"]);
}

#[test]
fn shards_stand_beside_folders_and_tars_and_are_told_by_their_content() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    touch(root, &["a/x.jpg", "z/y.png"]);
    write_shard(&root.join("b.tar"), &["q/1.jpg", "0.jpg"]);
    write_tar(&root.join("c.tar"), &[("t.jpg", b"tee")]);
    write_shard(&root.join("d"), &["s.jpg"]);
    fs::write(root.join("list.txt"), "d\n").unwrap();
    let names = ["z", "b.tar", "c.tar", "a"].map(|name| root.join(name).to_str().unwrap().to_owned());
    let images = [&names[..], &[format!("@{}", root.join("list.txt").display())]].concat();
    let config = DataConfig { images, ..DataConfig::default() };
    let cache = root.join("run/index.bin");
    let index = ImageIndex::build(&config, Some(&cache)).unwrap();
    let expected = ["a/x.jpg", "b.tar/q/1.jpg", "b.tar/0.jpg", "c.tar/t.jpg", "d/s.jpg", "z/y.png"];
    assert_eq!(relative_names(&index, root), expected, "holders sorted, a shard in its own order");
    let contents: Vec<_> = (0..6).map(|i| index.read(i).unwrap().into_owned()).collect();
    assert_eq!(contents, [&b"a/x.jpg"[..], b"Q/1.JPG", b"0.JPG", b"tee", b"S.JPG", b"z/y.png"]);
    assert!(matches!(index.read(1).unwrap(), Cow::Borrowed(_)), "images of a shard are not copied");
    let name = index.relative_names();
    assert_eq!((0..6).map(|i| String::from_utf8(name(i)).unwrap()).collect::<Vec<_>>(), expected);
    for limit in 1..6 {
        let part = ImageIndex::build(&DataConfig { limit, ..config.clone() }, None).unwrap();
        assert_eq!(relative_names(&part, root), expected[..limit]);
        assert_ne!(part.manifest_hash(), index.manifest_hash());
        assert_eq!(part.read(limit - 1).unwrap(), contents[limit - 1]);
    }
    age(root);
    ImageIndex::build(&config, Some(&cache)).unwrap();
    let cached = index_cache::load(&cache, &config.images, 0).unwrap();
    assert!(same(&cached, &index));
    assert_eq!(cached.read(2).unwrap(), contents[2]);
    write_shard(&root.join("b.tar"), &["q/1.jpg"]);
    assert!(index_cache::load(&cache, &config.images, 0).is_none(), "another shard of the name");
    assert_eq!(index.read(2).unwrap(), contents[2], "an open shard stays what it was");
}

#[test]
fn a_shard_given_twice_or_damaged_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    write_shard(&path, &["a.jpg", "b.jpg"]);
    let twice = ImageIndex::build(&config(&[&path, &path]), None).unwrap_err();
    assert!(matches!(&twice, DataError::Duplicate { name } if name.ends_with("/s")), "{twice}");
    let sound = fs::read(&path).unwrap();
    fs::write(&path, &sound[..sound.len() - 1]).unwrap();
    let cut = ImageIndex::build(&config(&[&path]), None).unwrap_err();
    assert!(matches!(&cut, DataError::Shard { source: ShardError::Length { .. }, .. }), "{cut}");
    assert!(cut.hint().unwrap().contains("cut off"));
    let mut damaged = sound.clone();
    damaged[80] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let index = ImageIndex::build(&config(&[&path]), None).unwrap();
    let error = index.read(0).unwrap_err().to_string();
    assert_eq!(error, "damaged shard: the checksum of image 0 does not match");
    assert_eq!(index.read(1).unwrap(), &b"B.JPG"[..]);
    damaged[sound.len() - 1] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let index = ImageIndex::build(&config(&[&path]), None).unwrap();
    assert!(index.name(1).ends_with("/s/#1"), "{}", index.name(1));
}

#[test]
fn a_shard_may_move_and_be_renamed() {
    let dir = tempfile::tempdir().unwrap();
    let hash = |name: &str, images: &[&str]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_shard(&path, images);
        ImageIndex::build(&config(&[&path]), None).unwrap().manifest_hash()
    };
    assert_eq!(hash("one", &["a.jpg"]), hash("far/away/two", &["a.jpg"]));
    assert_ne!(hash("one", &["a.jpg"]), hash("one", &["b.jpg"]));
}

#[test]
fn names_below_the_common_folder_do_not_depend_on_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    touch(root, &["x/pics/a/1.jpg", "y/pics/a/1.jpg"]);
    let names = |sources: &[&Path]| {
        let index = ImageIndex::build(&config(sources), None).unwrap();
        let name = index.relative_names();
        (0..index.len()).map(|i| String::from_utf8(name(i)).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(names(&[&root.join("x/pics")]), ["a/1.jpg"]);
    assert_eq!(names(&[&root.join("x/pics/a/1.jpg")]), ["1.jpg"]);
    assert_eq!(names(&[&root.join("x/pics"), &root.join("y/pics")]), ["x/pics/a/1.jpg", "y/pics/a/1.jpg"]);
    write_shard(&root.join("s"), &["a/1.jpg"]);
    assert_eq!(names(&[&root.join("s")]), ["a/1.jpg"]);
}

#[test]
fn what_is_not_a_whole_tar_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tar = root.join("t.tar");
    write_tar(&tar, &[("a.jpg", &[7; 5000])]);
    let whole = fs::read(&tar).unwrap();
    for bytes in [
        &b""[..],
        b"not a tar at all, but long enough to be taken for a header of five hundred bytes",
        &whole[..3000],
    ] {
        fs::write(&tar, bytes).unwrap();
        let error = ImageIndex::build(&config(&[&tar]), None).unwrap_err();
        assert!(matches!(error, DataError::NotATar { .. }), "{} bytes: {error:?}", bytes.len());
        fs::write(root.join("t.tgz"), bytes).unwrap();
        let error =
            ImageIndex::build(&config(&[&root.join("t.tgz")]), Some(&root.join("cache"))).unwrap_err();
        assert!(matches!(error, DataError::NotATar { .. }), "{} bytes: {error:?}", bytes.len());
    }
    let left: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "nothing half-written stays: {left:?}");
}

#[test]
fn errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let nothing = ImageIndex::build(&config(&[root]), None).unwrap_err();
    assert!(matches!(nothing, DataError::NothingFound { .. }));
    assert!(nothing.hint().unwrap().contains("jpeg, "));
    let missing = ImageIndex::build(&config(&[&root.join("nowhere")]), None).unwrap_err();
    assert!(matches!(missing, DataError::SourceMissing { .. }));
    assert!(matches!(ImageIndex::build(&config(&[]), None), Err(DataError::NoSource)));
    touch(root, &["a/b.jpg"]);
    let twice = ImageIndex::build(&config(&[root, &root.join("a")]), None).unwrap_err();
    assert!(matches!(&twice, DataError::Duplicate { name } if name.ends_with("a/b.jpg")), "{twice}");
}

#[test]
fn the_hash_follows_the_list_and_not_its_place() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let hash = |root: &Path| ImageIndex::build(&config(&[root]), None).unwrap().manifest_hash();
    touch(one.path(), &["x/a.jpg", "b.jpg"]);
    touch(two.path(), &["b.jpg", "x/a.jpg"]);
    assert_eq!(hash(one.path()), hash(two.path()));
    touch(two.path(), &["c.jpg"]);
    assert_ne!(hash(one.path()), hash(two.path()));
}

#[test]
fn a_cache_is_used_while_it_holds_and_only_then() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("pics");
    let cache = dir.path().join("run/index.bin");
    touch(&root, &["a.jpg", "s/b.jpg"]);
    age(&root);
    let config = config(&[&root]);
    let fresh = ImageIndex::build(&config, Some(&cache)).unwrap();
    assert!(index_cache::load(&cache, &config.images, 0).is_some_and(|cached| same(&cached, &fresh)));
    assert!(index_cache::load(&cache, &config.images, 1).is_none(), "another limit");
    assert!(index_cache::load(&cache, &["elsewhere".to_owned()], 0).is_none(), "other sources");

    touch(&root, &["s/c.jpg"]);
    assert_eq!(ImageIndex::build(&config, Some(&cache)).unwrap().len(), 3, "a new file is seen");
    let again = index_cache::load(&cache, &config.images, 0);
    assert!(again.is_none(), "a folder listed while it changed is not trusted");
}

#[test]
fn a_damaged_cache_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("pics");
    let cache = dir.path().join("index.bin");
    touch(&root, &["a.jpg", "s/b.jpg"]);
    age(&root);
    let config = config(&[&root]);
    let fresh = ImageIndex::build(&config, Some(&cache)).unwrap();
    let sound = fs::read(&cache).unwrap();
    for at in 0..sound.len() {
        let mut damaged = sound.clone();
        damaged[at] ^= 0x41;
        fs::write(&cache, &damaged).unwrap();
        assert!(index_cache::load(&cache, &config.images, 0).is_none(), "byte {at}");
        fs::write(&cache, &sound[..at]).unwrap();
        assert!(index_cache::load(&cache, &config.images, 0).is_none(), "cut at {at}");
    }
    assert!(same(&ImageIndex::build(&config, Some(&cache)).unwrap(), &fresh));
    assert_eq!(fs::read(&cache).unwrap()[..16], sound[..16]);
    assert!(index_cache::load(&cache, &config.images, 0).is_some_and(|cached| same(&cached, &fresh)));
}

#[test]
fn a_million_names_fit_into_little_memory_and_come_back_from_the_cache() {
    let holders = vec![Holder { path: PathBuf::from("/data"), root_length: 5, content: Content::Folder }];
    let count = if cfg!(miri) { 100 } else { 1_000_000 };
    let images = (0..count)
        .map(|i| sources::Found { holder: 0, name: format!("{i:08}.jpg").into_bytes(), span: None })
        .collect();
    let index = ImageIndex::from_findings(Findings { holders, images, stamps: Vec::new() }, 0).unwrap();
    let bytes = index.names.capacity() + 8 * index.name_end.capacity() + 16 * index.spans.capacity();
    assert_eq!(index.len(), count);
    assert!(bytes <= 20 * count, "{} bytes an image", bytes / count);
    assert_eq!(index.name(count / 2), format!("/data/{:08}.jpg", count / 2));

    let dir = tempfile::tempdir().unwrap();
    let (cache, sources) = (dir.path().join("index.bin"), ["/data".to_owned()]);
    index_cache::store(&cache, &sources, 0, Vec::new(), &index).unwrap();
    let cached = index_cache::load(&cache, &sources, 0).unwrap();
    assert_eq!((cached.len(), cached.manifest_hash()), (count, index.manifest_hash()));
}

#[test]
fn a_vanished_file_is_told_from_bad_content() {
    let dir = tempfile::tempdir().unwrap();
    touch(dir.path(), &["a.jpg"]);
    let index = ImageIndex::build(&config(&[dir.path()]), None).unwrap();
    fs::remove_file(dir.path().join("a.jpg")).unwrap();
    let error = index.read(0).unwrap_err();
    assert!(matches!(error, ReadError::Vanished));
    assert!(error.to_string().starts_with("input/output error"), "{error}");
}
