//! Backward pass of the class-attention block: plain and complete, the truth that faster ones are tested against.

use super::{ClassAttention, ClassAttentionParameters, take};
use crate::error::{Result, check_length, check_scratch};
use crate::math::{add_scaled, dot, gelu, gelu_derivative, sqrt};
use crate::shape::{Tokens, row, row_mut};

impl ClassAttention<'_> {
    /// Gradients of the block for one class token, given `∂loss/∂out`.
    ///
    /// - `patches`: `[n, D]`; `class`, `grad_out`: `[D]`.
    /// - `scratch`: at least [`ClassAttention::gradient_scratch_len`] values.
    /// - `parameters`: added to, each as long as the parameter.
    /// - `grad_patches`: `[n, D]` and `grad_class`: `[D]`, overwritten.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`](crate::Error::LengthMismatch) if a buffer does not fit.
    pub fn gradient_into(
        &self,
        patches: Tokens<'_>,
        class: &[f32],
        grad_out: &[f32],
        scratch: &mut [f32],
        parameters: ClassAttentionParameters<&mut [f32]>,
        grad_patches: &mut [f32],
        grad_class: &mut [f32],
    ) -> Result<()> {
        let (dim, hidden, n) = (self.dim(), self.hidden(), patches.len());
        check_length("token dimension", dim, patches.dim())?;
        check_length("class token", dim, class.len())?;
        check_length("gradient of the class token out", dim, grad_out.len())?;
        check_length("gradient of the patches", n * dim, grad_patches.len())?;
        check_length("gradient of the class token", dim, grad_class.len())?;
        check_scratch("class-attention gradient scratch", self.gradient_scratch_len(n), scratch.len())?;
        for name in ClassAttentionParameters::<()>::NAMES {
            let expected = ClassAttentionParameters::<()>::len_of(name, dim, hidden);
            check_length(name, expected, parameters.get(name).map_or(0, |gradient| gradient.len()))?;
        }
        let p = parameters;

        let mut rest = scratch;
        // Forward, keeping what the way back needs; row 0 of `normed`, `keys` and `values` is the class token.
        let normed = take(&mut rest, (n + 1) * dim);
        let keys = take(&mut rest, (n + 1) * dim);
        let values = take(&mut rest, (n + 1) * dim);
        let [attention, slopes] = [(); 2].map(|()| take(&mut rest, self.heads * (n + 1)));
        let [query, context, middle, normed2] = [(); 4].map(|()| take(&mut rest, dim));
        let [before, after] = [(); 2].map(|()| take(&mut rest, hidden));
        self.norm1.rows(class, &mut normed[..dim]);
        self.norm1.rows(patches.as_slice(), &mut normed[dim..]);
        self.query.rows(&normed[..dim], query);
        self.key.rows(normed, keys);
        self.value.rows(normed, values);
        let (own_keys, keys_of_patches) = keys.split_at(dim);
        let (own_values, values_of_patches) = values.split_at(dim);
        self.attend(
            0,
            query,
            own_keys,
            own_values,
            keys_of_patches,
            values_of_patches,
            0..n,
            attention,
            context,
        );
        self.projection.rows(context, middle);
        add_scaled(middle, 1.0, class);
        self.norm2.rows(middle, normed2);
        self.fc1.rows(normed2, before);
        for (after, before) in after.iter_mut().zip(before.iter()) {
            *after = gelu(*before);
        }

        // MLP.
        let grad_hidden = take(&mut rest, hidden);
        let [grad_normed2, grad_context, grad_query, grad_key, grad_value, grad_normed, grad_own] =
            [(); 7].map(|()| take(&mut rest, dim));
        for buffer in [&mut *grad_hidden, grad_normed2, grad_context, grad_query, grad_own] {
            buffer.fill(0.0);
        }
        self.fc2.backward(after, grad_out, p.fc2_weight, p.fc2_bias, grad_hidden);
        for (gradient, before) in grad_hidden.iter_mut().zip(before.iter()) {
            *gradient *= gelu_derivative(*before);
        }
        self.fc1.backward(normed2, grad_hidden, p.fc1_weight, p.fc1_bias, grad_normed2);
        grad_class.copy_from_slice(grad_out);
        self.norm2.backward(middle, grad_normed2, p.norm2_weight, p.norm2_bias, grad_class);

        // Attention: `grad_class` is now the gradient after the first residual.
        self.projection.backward(context, grad_class, p.projection_weight, p.projection_bias, grad_context);
        let width = dim / self.heads;
        let scale = 1.0 / sqrt(width as f32);
        let head = |head: usize| head * width..(head + 1) * width;
        for h in 0..self.heads {
            let weights = row(attention, h, n + 1);
            let slopes = row_mut(slopes, h, n + 1);
            for (slope, value) in slopes.iter_mut().zip(values.chunks_exact(dim)) {
                *slope = dot(&grad_context[head(h)], &value[head(h)]);
            }
            let mean = dot(weights, slopes);
            for ((slope, weight), key) in slopes.iter_mut().zip(weights).zip(keys.chunks_exact(dim)) {
                *slope = scale * weight * (*slope - mean);
                add_scaled(&mut grad_query[head(h)], *slope, &key[head(h)]);
            }
        }
        self.query.backward(&normed[..dim], grad_query, p.query_weight, p.query_bias, grad_own);

        // Keys, values and LN1 of the class token (slot 0) and of every patch.
        grad_patches.fill(0.0);
        for slot in 0..=n {
            grad_key.fill(0.0);
            grad_value.fill(0.0);
            for h in 0..self.heads {
                add_scaled(&mut grad_key[head(h)], slopes[h * (n + 1) + slot], &query[head(h)]);
                add_scaled(&mut grad_value[head(h)], attention[h * (n + 1) + slot], &grad_context[head(h)]);
            }
            let normed = row(normed, slot, dim);
            grad_normed.fill(0.0);
            self.key.backward(normed, grad_key, p.key_weight, p.key_bias, grad_normed);
            self.value.backward(normed, grad_value, p.value_weight, p.value_bias, grad_normed);
            if slot == 0 {
                add_scaled(grad_normed, 1.0, grad_own);
                self.norm1.backward(class, grad_normed, p.norm1_weight, p.norm1_bias, grad_class);
            } else {
                let grad_patch = row_mut(grad_patches, slot - 1, dim);
                let patch = patches.row(slot - 1);
                self.norm1.backward(patch, grad_normed, p.norm1_weight, p.norm1_bias, grad_patch);
            }
        }
        Ok(())
    }
    /// Values of scratch memory [`ClassAttention::gradient_into`] needs for `n` patches.
    pub const fn gradient_scratch_len(&self, n: usize) -> usize {
        let tokens = n.saturating_add(1);
        let per_token = 3 * self.dim() + 2 * self.heads();
        tokens.saturating_mul(per_token).saturating_add(11 * self.dim() + 3 * self.hidden())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Owned, uniform};
    use super::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (dim, hidden, n, heads) = (6, 10, 3, 2);
        let owned = Owned::new(dim, hidden, 11);
        let mut state = 5;
        let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| uniform(&mut state)).collect() };
        let (x, class, upstream) = (draw(n * dim), draw(dim), draw(dim));
        // The loss is the dot product of the output with `upstream`.
        let loss = |parameters: &ClassAttentionParameters<Vec<f32>>, x: &[f32], class: &[f32]| -> f64 {
            let block = ClassAttention::new(parameters.as_ref().map(|vec| vec.as_slice()), heads).unwrap();
            let (mut out, mut attention) = (vec![0.0; dim], vec![0.0; heads * (n + 1)]);
            let mut scratch = vec![0.0; block.scratch_len(n)];
            let tokens = Tokens::new(x, n, dim).unwrap();
            block.forward_into(tokens, class, &mut scratch, &mut out, &mut attention).unwrap();
            out.iter().zip(&upstream).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };

        let mut gradients = owned.parameters().clone().map(|weights| vec![0.0; weights.len()]);
        let (mut grad_x, mut grad_class) = (vec![7.0; n * dim], vec![7.0; dim]);
        let block = owned.block(heads);
        block
            .gradient_into(
                Tokens::new(&x, n, dim).unwrap(),
                &class,
                &upstream,
                &mut vec![3.0; block.gradient_scratch_len(n)],
                gradients.as_mut().map(|vec| vec.as_mut_slice()),
                &mut grad_x,
                &mut grad_class,
            )
            .unwrap();

        let step = 1e-2_f32;
        let check = |what: &str, found: f32, moved: &dyn Fn(f32) -> f64| {
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            assert!((f64::from(found) - slope).abs() < 2e-3 * (1.0 + slope.abs()), "{what}: {found} {slope}");
        };
        let at = |values: &[f32], index: usize, by: f32| {
            let mut values = values.to_vec();
            values[index] += by;
            values
        };
        for name in ClassAttentionParameters::<()>::NAMES {
            let found = gradients.get(name).unwrap();
            for index in (0..found.len()).step_by(3) {
                check(name, found[index], &|by| {
                    let moved = ClassAttentionParameters::from_fn(|other| {
                        let values = owned.parameters().get(other).unwrap();
                        if other == name { at(values, index, by) } else { values.clone() }
                    });
                    loss(&moved, &x, &class)
                });
            }
        }
        for index in 0..x.len() {
            check("patches", grad_x[index], &|by| loss(owned.parameters(), &at(&x, index, by), &class));
        }
        for index in 0..dim {
            check("class", grad_class[index], &|by| loss(owned.parameters(), &x, &at(&class, index, by)));
        }
    }
}
