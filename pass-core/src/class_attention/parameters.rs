//! The sixteen parameters of a class-attention block, by field and by their names in a checkpoint.

macro_rules! parameters {
    ($($(#[$doc:meta])* $field:ident: $name:literal [$($len:tt)+],)+) => {
        /// The parameters of a class-attention block: `&[f32]` for weights, `&mut [f32]` for their gradients.
        #[derive(Clone, Copy, Debug)]
        pub struct ClassAttentionParameters<T> {
            $($(#[$doc])* pub $field: T,)+
        }

        impl<T> ClassAttentionParameters<T> {
            /// Names inside a block of a checkpoint, in its order.
            pub const NAMES: [&'static str; 16] = [$($name),+];

            /// Collects the parameters by name.
            pub fn from_fn(mut of: impl FnMut(&'static str) -> T) -> Self {
                Self { $($field: of($name),)+ }
            }

            /// The parameter called `name` in a checkpoint.
            pub fn get(&self, name: &str) -> Option<&T> {
                match name {
                    $($name => Some(&self.$field),)+
                    _ => None,
                }
            }

            /// The same parameters, borrowed.
            pub fn as_ref(&self) -> ClassAttentionParameters<&T> {
                ClassAttentionParameters { $($field: &self.$field,)+ }
            }

            /// The same parameters, borrowed mutably.
            pub fn as_mut(&mut self) -> ClassAttentionParameters<&mut T> {
                ClassAttentionParameters { $($field: &mut self.$field,)+ }
            }

            /// Maps every parameter.
            pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> ClassAttentionParameters<U> {
                ClassAttentionParameters { $($field: f(self.$field),)+ }
            }

            /// Elements of the parameter called `name` for tokens of `dim` values and an MLP of `hidden`; 0 for a name
            /// that is not one of [`Self::NAMES`].
            pub fn len_of(name: &str, dim: usize, hidden: usize) -> usize {
                match name {
                    $($name => parameters!(@len dim hidden $($len)+),)+
                    _ => 0,
                }
            }
        }
    };
    (@len $dim:ident $hidden:ident D) => { $dim };
    (@len $dim:ident $hidden:ident M) => { $hidden };
    (@len $dim:ident $hidden:ident D D) => { $dim.saturating_mul($dim) };
    (@len $dim:ident $hidden:ident D M) => { $dim.saturating_mul($hidden) };
}

parameters! {
    /// `[D]`
    norm1_weight: "norm1.weight" [D],
    /// `[D]`
    norm1_bias: "norm1.bias" [D],
    /// `[D, D]`
    query_weight: "attn.q.weight" [D D],
    /// `[D]`
    query_bias: "attn.q.bias" [D],
    /// `[D, D]`
    key_weight: "attn.k.weight" [D D],
    /// `[D]`; its gradient is zero in exact arithmetic: a constant added to all scores changes no softmax.
    key_bias: "attn.k.bias" [D],
    /// `[D, D]`
    value_weight: "attn.v.weight" [D D],
    /// `[D]`
    value_bias: "attn.v.bias" [D],
    /// `[D, D]`
    projection_weight: "attn.proj.weight" [D D],
    /// `[D]`
    projection_bias: "attn.proj.bias" [D],
    /// `[D]`
    norm2_weight: "norm2.weight" [D],
    /// `[D]`
    norm2_bias: "norm2.bias" [D],
    /// `[M, D]`
    fc1_weight: "mlp.fc1.weight" [D M],
    /// `[M]`
    fc1_bias: "mlp.fc1.bias" [M],
    /// `[D, M]`
    fc2_weight: "mlp.fc2.weight" [D M],
    /// `[D]`
    fc2_bias: "mlp.fc2.bias" [D],
}
