//! Which image comes when.
//!
//! The images of a run are one endless sequence: epoch after epoch, each a permutation of all images. A batch takes
//! consecutive places within an epoch; where fewer are left than a batch needs, the rest of the epoch is passed over,
//! different images each time. Only the batch over all ranks counts here, never how many ranks share it.

use crate::random::shuffled;

/// The sequence of images and how it is cut into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Seed of the permutations.
    pub seed: u64,
    /// Images of an epoch, at least one batch.
    pub images: u64,
    /// Images of a batch, over all ranks, at least 1.
    pub batch: u64,
}

impl Order {
    /// Batches of a whole epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.images / self.batch
    }

    /// The epoch of a place of the sequence.
    pub fn epoch(&self, place: u64) -> u64 {
        place / self.images
    }

    /// The image at a place of the sequence.
    pub fn image(&self, place: u64) -> u64 {
        shuffled(self.seed, self.epoch(place), place % self.images, self.images)
    }

    /// Where the next batch begins when everything before `cursor` has been used.
    pub fn start(&self, cursor: u64) -> u64 {
        let used = cursor % self.images;
        if used + self.batch > self.images { cursor - used + self.images } else { cursor }
    }

    /// The cursor behind that batch.
    pub fn after(&self, cursor: u64) -> u64 {
        self.start(cursor) + self.batch
    }

    /// The cursor after `steps` batches of this size.
    pub fn cursor(&self, steps: u64) -> u64 {
        steps / self.steps_per_epoch() * self.images + steps % self.steps_per_epoch() * self.batch
    }

    /// How many batches of this size lead to `cursor`: the inverse of [`Order::cursor`]. Between two such cursors, where
    /// batches of another size can leave it, the next one counts, but never one of the next epoch.
    pub fn steps(&self, cursor: u64) -> u64 {
        let start = self.start(cursor);
        let within = (start % self.images).div_ceil(self.batch).min(self.steps_per_epoch() - 1);
        self.epoch(start) * self.steps_per_epoch() + within
    }

    /// Batches from `cursor` to the end of epoch number `epochs - 1`.
    pub fn steps_left(&self, cursor: u64, epochs: u64) -> u64 {
        let start = self.start(cursor);
        match epochs.checked_sub(self.epoch(start) + 1) {
            Some(whole) => (self.images - start % self.images) / self.batch + whole * self.steps_per_epoch(),
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rest_of_an_epoch_is_passed_over() {
        let order = Order { seed: 1, images: 10, batch: 4 };
        let starts: Vec<u64> =
            std::iter::successors(Some(0), |&cursor| Some(order.start(order.after(cursor))))
                .take(5)
                .collect();
        assert_eq!(starts, [0, 4, 10, 14, 20]);
        assert_eq!((order.steps(8), order.steps(10), order.cursor(2)), (2, 2, 10));
        assert_eq!((order.steps_left(0, 3), order.steps_left(4, 3), order.steps_left(8, 1)), (6, 5, 0));
    }

    #[test]
    fn another_batch_goes_on_at_the_same_place() {
        let (four, three) =
            (Order { seed: 1, images: 26, batch: 8 }, Order { seed: 1, images: 26, batch: 6 });
        let cursor = four.after(four.cursor(4)); // the second batch of epoch 1 is done
        assert_eq!(cursor, 26 + 16);
        assert_eq!(three.start(cursor), cursor, "no image is left out, none comes twice");
        assert_eq!((three.steps(cursor), three.steps_left(cursor, 2)), (4 + 3, 1));
        assert_eq!(three.start(three.after(cursor)), 52);
    }

    proptest! {
        #[test]
        fn steps_and_cursor_are_inverse(images in 1u64..200, batch in 1u64..50, steps in 0u64..1000) {
            let order = Order { seed: 0, images: images.max(batch), batch };
            prop_assert_eq!(order.steps(order.cursor(steps)), steps);
            prop_assert_eq!(order.steps(order.after(order.cursor(steps))), steps + 1);
            let epochs = steps / order.steps_per_epoch() + 2;
            prop_assert_eq!(order.steps_left(order.cursor(steps), epochs), epochs * order.steps_per_epoch() - steps);
        }

        #[test]
        fn steps_never_fall_whatever_the_cursor(images in 1u64..200, batch in 1u64..50, cursor in 0u64..1000) {
            let order = Order { seed: 0, images: images.max(batch), batch };
            let next = order.after(cursor);
            prop_assert!(order.steps(next) >= order.steps(cursor) && order.steps(next) <= order.steps(cursor) + 1);
            prop_assert!(order.epoch(order.start(cursor)) == order.epoch(next - 1), "a batch is of one epoch");
        }
    }
}
