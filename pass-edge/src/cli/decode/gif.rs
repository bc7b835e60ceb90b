//! The first frame of a GIF: whether it is complete, and how large a canvas shows all of it.

use std::borrow::Cow;

use super::DecodeError;

/// Checks that the first frame is complete. A frame that reaches beyond the canvas of the header gives a copy of the
/// file with a canvas that holds it.
pub(super) fn whole_canvas(bytes: &[u8]) -> Result<Cow<'_, [u8]>, DecodeError> {
    let frame = first_frame(bytes).ok_or_else(|| DecodeError::Truncated {
        format: "GIF",
        detail: "the first frame is not complete".to_owned(),
    })?;
    let at = |offset: usize| u16::from_le_bytes([bytes[offset], bytes[offset + 1]]);
    let (width, height) = (at(6), at(8));
    let right = at(frame + 1).saturating_add(at(frame + 5));
    let bottom = at(frame + 3).saturating_add(at(frame + 7));
    if right <= width && bottom <= height {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut patched = bytes.to_vec();
    patched[6..8].copy_from_slice(&width.max(right).to_le_bytes());
    patched[8..10].copy_from_slice(&height.max(bottom).to_le_bytes());
    Ok(Cow::Owned(patched))
}

/// Offset of the first image descriptor, if the file holds all of that frame.
fn first_frame(bytes: &[u8]) -> Option<usize> {
    let color_table = |flags: u8| if flags & 0x80 != 0 { 3_usize << ((flags & 7) + 1) } else { 0 };
    let mut at = 13 + color_table(*bytes.get(10)?);
    loop {
        match bytes.get(at)? {
            0x21 => at = skip_blocks(bytes, at + 2)?,
            0x2C => {
                let data = at + 10 + color_table(*bytes.get(at + 9)?);
                skip_blocks(bytes, data + 1)?;
                return Some(at);
            }
            // what follows is no GIF block: the decoder has the better message
            _ => return Some(at).filter(|at| bytes.len() > at + 9),
        }
    }
}

/// The offset behind a chain of data blocks and its terminator.
fn skip_blocks(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let length = usize::from(*bytes.get(at)?);
        at += 1 + length;
        if length == 0 {
            return Some(at);
        }
    }
}
