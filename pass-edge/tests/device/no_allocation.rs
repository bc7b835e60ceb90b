//! Reading a model and computing features takes nothing from the heap.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crate::SMALL;
use crate::random_vit::{FloatVit, photo};
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::{features, self_test};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system allocator, counting on the calling thread.
struct Counting;

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
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
fn nothing_is_allocated_after_the_start() {
    let file = FloatVit::random(SMALL, 1).quantized();
    let rgb = photo(&SMALL, 1);
    let mut scratch = ScratchBuffer::new(ScratchLen::of(&SMALL));
    let mut out = vec![0.0; SMALL.tokens() * SMALL.dim()];
    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    let model = Model::from_bytes(&file).unwrap();
    let (height, width) = SMALL.image_size();
    let image = Image::new(&rgb, (height, width), 3 * width, PixelOrder::Rgb).unwrap();
    for kernel in Kernel::available() {
        features(&model, &image, kernel, &mut scratch.scratch(), &mut out).unwrap();
        self_test::verify(&model, kernel, &mut scratch.scratch(), &mut out).unwrap();
    }
    assert_eq!(ALLOCATIONS.get(), before);
}
