//! A shard of a million images opens, and gives any of them, with a few kilobytes of memory.
//!
//! This file is a program of its own because it counts every allocation.

#![expect(unsafe_code, reason = "counting allocations takes an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pass_host::config::DataConfig;
use pass_host::data::ImageIndex;
use pass_host::data::shard::{NewImage, ShardWriter, Stored};

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's; only a number is added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        BYTES.fetch_add(size, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const IMAGES: usize = 1_000_000;
/// All that opening and reading may take from the heap.
const FEW_BYTES: usize = 16 << 10;

#[test]
#[expect(clippy::print_stderr, reason = "how long it took, for who asks with --nocapture")]
fn a_million_images_open_in_constant_memory() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("million");
    let mut writer = ShardWriter::create(&path).expect("a file");
    for i in 0..IMAGES {
        let bytes = (i as u64).to_le_bytes().to_vec();
        let image = NewImage { bytes, width: 1, height: 1, stored: Stored::Original };
        writer.push(format!("n{:04}/{i:08}.jpg", i % 1000).as_bytes(), &image).expect("space");
    }
    writer.finish().expect("space");

    let images = vec![path.to_str().expect("UTF-8").to_owned()];
    let config = DataConfig { images, ..DataConfig::default() };
    for cache in [None, Some(dir.path().join("index.bin"))] {
        let before = BYTES.load(Ordering::Relaxed);
        let start = Instant::now();
        let index = ImageIndex::build(&config, cache.as_deref()).expect("a shard");
        let opened = start.elapsed();
        assert_eq!(index.len(), IMAGES);
        for i in [0, 1, 499_999, IMAGES - 1] {
            assert_eq!(index.read(i).expect("an image"), &(i as u64).to_le_bytes()[..]);
            assert!(index.name(i).ends_with(&format!("{i:08}.jpg")));
        }
        let taken = BYTES.load(Ordering::Relaxed) - before;
        assert!(taken < FEW_BYTES, "{taken} bytes for {IMAGES} images");
        eprintln!("opened {IMAGES} images in {opened:?}, {taken} bytes");
    }
}
