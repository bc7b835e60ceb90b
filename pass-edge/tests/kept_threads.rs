//! Threads that are kept take nothing from the heap, whichever of them computes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::Threads;
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::{features, features_with_pool};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system allocator, counting on all threads: this file holds one test, so nothing else runs beside it.
struct Counting;

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn threads_that_are_set_up_allocate_nothing() {
    let file =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/edge/small.pass")).unwrap();
    let model = Model::from_bytes(&file).unwrap();
    let (height, width) = model.architecture().image_size();
    let frames: Vec<Vec<u8>> = (1..=8_usize)
        .map(|step| (0..3 * height * width).map(|index| (index * step % 251) as u8).collect())
        .collect();
    for threads in 1..=3 {
        let pool = Threads::new(threads).unwrap();
        let mut scratch = ScratchBuffer::new(ScratchLen::with_threads(model.architecture(), threads));
        let (mut out, mut alone) = (vec![0.0; model.output_len()], vec![0.0; model.output_len()]);
        // in a round in which a thread first finds work it sets itself up; one round in ten is without that
        let fewest = pool.install(|| {
            (0..10)
                .map(|_| {
                    let before = ALLOCATIONS.load(Ordering::Relaxed);
                    for frame in &frames {
                        let image = Image::new(frame, (height, width), 3 * width, PixelOrder::Rgb).unwrap();
                        let mut scratch = scratch.scratch();
                        features_with_pool(&model, &image, Kernel::best(), &pool, &mut scratch, &mut out)
                            .unwrap();
                        features(&model, &image, Kernel::Scalar, &mut scratch, &mut alone).unwrap();
                        assert!(out == alone, "{threads} threads");
                    }
                    ALLOCATIONS.load(Ordering::Relaxed) - before
                })
                .min()
        });
        assert_eq!(fewest, Some(0), "{threads} threads");
    }
}
