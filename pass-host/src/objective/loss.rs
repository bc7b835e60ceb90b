//! Which student row learns from which teacher row, with which weight (SEMANTICS §4).

/// One cross-entropy term: a row of student logits against a row of teacher logits.
pub type Pair = (u32, u32);

/// Terms of the class loss: every teacher global crop against every *other* student crop of the same image.
///
/// Rows are crop-major: row `crop · batch + image`, global crops first. The loss is the mean over images and terms.
pub fn class_pairs(batch: usize, global_crops: usize, local_crops: usize) -> (Vec<Pair>, f32) {
    let mut pairs = Vec::new();
    for teacher in 0..global_crops {
        for student in (0..global_crops + local_crops).filter(|&student| student != teacher) {
            for image in 0..batch {
                pairs.push(((student * batch + image) as u32, (teacher * batch + image) as u32));
            }
        }
    }
    let weight = 1.0 / pairs.len().max(1) as f32;
    (pairs, weight)
}

/// Terms of the patch loss: every patch against the same patch of the same crop.
///
/// `groups` lists `(crops, patches per crop)` in row order. The loss is the mean over the patches and images of a
/// crop, then the plain mean over crops: a patch of a small crop weighs more.
pub fn patch_pairs(batch: usize, groups: &[(usize, usize)]) -> (Vec<Pair>, Vec<f32>) {
    let crops: usize = groups.iter().map(|(crops, _)| crops).sum();
    let (mut pairs, mut weights) = (Vec::new(), Vec::new());
    for &(group_crops, patches) in groups {
        let weight = 1.0 / (crops * batch * patches) as f32;
        for _ in 0..group_crops * batch * patches {
            let row = pairs.len() as u32;
            pairs.push((row, row));
            weights.push(weight);
        }
    }
    (pairs, weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_loss_skips_the_same_view() {
        let (pairs, weight) = class_pairs(2, 2, 1);
        // two teachers, each with two other crops, two images
        assert_eq!(pairs.len(), 8);
        assert!(pairs.iter().all(|(student, teacher)| student != teacher && student % 2 == teacher % 2));
        assert!((weight - 1.0 / 8.0).abs() < 1e-9);
    }

    #[test]
    fn patch_weights_sum_to_one_and_favor_small_crops() {
        let (pairs, weights) = patch_pairs(3, &[(2, 9), (2, 4)]);
        assert_eq!(pairs.len(), 3 * (2 * 9 + 2 * 4));
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        assert!(weights[0] < *weights.last().expect("not empty"));
    }
}
