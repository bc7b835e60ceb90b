//! Panels with titles and captions on one page.

use super::canvas::{Canvas, Rect};
use super::colors::{FAINT, INK, LINE, PAPER, heat};
use super::label::{Align, Style, Weight};

const TITLE: Style = Style { size: 23.0, weight: Weight::Medium, color: INK };
const HEADER: Style = Style { size: 17.0, weight: Weight::Medium, color: INK };
const CAPTION: Style = Style { size: 15.0, weight: Weight::Regular, color: FAINT };

const MARGIN: usize = 24;
/// Between panels.
const GAP: usize = 12;
/// Between rows.
const ROW_GAP: usize = 18;
/// Size of the color scale.
const BAR: (usize, usize) = (14, 240);
/// A page is at least this wide, so that its title has room.
const LEAST_WIDTH: usize = 560;

/// One picture.
#[derive(Clone, Debug)]
pub struct Panel {
    /// The picture.
    pub picture: Canvas,
    /// What is written below it.
    pub caption: String,
}

/// Panels side by side.
#[derive(Clone, Debug)]
pub struct Row {
    /// What is written above them.
    pub label: String,
    /// The panels, one a column.
    pub panels: Vec<Panel>,
}

/// The color scale and its ends.
#[derive(Clone, Debug)]
pub struct Scale {
    /// What the color means.
    pub caption: String,
    /// The dark end.
    pub low: String,
    /// The light end.
    pub high: String,
}

/// A page.
#[derive(Clone, Debug, Default)]
pub struct Sheet {
    /// First line.
    pub title: String,
    /// Name of each column.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
    /// Color scale below the rows.
    pub scale: Option<Scale>,
    /// Small print.
    pub note: String,
}

impl Sheet {
    /// Lays everything out.
    pub fn draw(&self) -> Canvas {
        let columns = self.rows.iter().map(|row| row.panels.len()).max().unwrap_or(0);
        let widest = |column: usize| {
            let panels = self.rows.iter().filter_map(|row| row.panels.get(column));
            panels.map(|panel| panel.picture.width()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(widest).collect();
        let inner = widths.iter().sum::<usize>() + GAP * columns.saturating_sub(1);
        let width = (inner + 2 * MARGIN).max(LEAST_WIDTH);
        let note = CAPTION.wrapped(&self.note, (width - 2 * MARGIN) as f32);
        let scale = self.scale.as_ref().map_or(0, |_| CAPTION.line() + BAR.0 + CAPTION.line() + ROW_GAP);
        let rows: usize = self.rows.iter().map(|row| row_height(row) + ROW_GAP).sum();
        let header = if self.columns.is_empty() { 0 } else { HEADER.line() + GAP };
        let height = 2 * MARGIN + TITLE.line() + GAP + header + rows + scale + note.len() * CAPTION.line();

        let mut page = Canvas::new(width, height, PAPER);
        let mut y = MARGIN;
        let title = TITLE.fitted(&self.title, (width - 2 * MARGIN) as f32);
        page.write(&title, MARGIN, y, Align::Left, TITLE);
        y += TITLE.line() + GAP;
        if !self.columns.is_empty() {
            let mut x = MARGIN;
            for (name, width) in self.columns.iter().zip(&widths) {
                page.write(&HEADER.fitted(name, *width as f32), x, y, Align::Left, HEADER);
                x += width + GAP;
            }
            y += HEADER.line() + GAP;
        }
        for row in &self.rows {
            draw_row(&mut page, row, &widths, y);
            y += row_height(row) + ROW_GAP;
        }
        if let Some(scale) = &self.scale {
            draw_scale(&mut page, scale, y);
            y += CAPTION.line() + BAR.0 + CAPTION.line() + ROW_GAP;
        }
        for line in note {
            page.write(&line, MARGIN, y, Align::Left, CAPTION);
            y += CAPTION.line();
        }
        page
    }
}

/// The caption of a panel in lines of its width.
fn caption(panel: &Panel) -> Vec<String> {
    CAPTION.wrapped(&panel.caption, panel.picture.width() as f32)
}

fn row_height(row: &Row) -> usize {
    let tallest = row.panels.iter().map(|panel| panel.picture.height()).max().unwrap_or(0);
    let label = if row.label.is_empty() { 0 } else { CAPTION.line() + 4 };
    let lines = row.panels.iter().map(|panel| caption(panel).len()).max().unwrap_or(0);
    label + tallest + if lines == 0 { 0 } else { lines * CAPTION.line() + 4 }
}

fn draw_row(page: &mut Canvas, row: &Row, widths: &[usize], mut y: usize) {
    if !row.label.is_empty() {
        let room = (page.width() - 2 * MARGIN) as f32;
        page.write(&CAPTION.fitted(&row.label, room), MARGIN, y, Align::Left, CAPTION);
        y += CAPTION.line() + 4;
    }
    let mut x = MARGIN;
    for (panel, width) in row.panels.iter().zip(widths) {
        page.paste(&panel.picture, x, y);
        for (line, text) in caption(panel).iter().enumerate() {
            let top = y + panel.picture.height() + 4 + line * CAPTION.line();
            page.write(text, x, top, Align::Left, CAPTION);
        }
        x += width + GAP;
    }
}

fn draw_scale(page: &mut Canvas, scale: &Scale, y: usize) {
    page.write(&scale.caption, MARGIN, y, Align::Left, CAPTION);
    let bar = Rect::at(MARGIN, y + CAPTION.line(), BAR.1, BAR.0);
    page.map(bar, |x, _, _| heat((x - bar.left) as f32 / (BAR.1 - 1) as f32));
    page.frame(bar, 1, LINE);
    page.write(&scale.low, bar.left, bar.bottom + 2, Align::Left, CAPTION);
    page.write(&scale.high, bar.right, bar.bottom + 2, Align::Right, CAPTION);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_stand_in_their_columns() {
        let panel = |width, color| Panel { picture: Canvas::new(width, 50, color), caption: "below".into() };
        let sheet = Sheet {
            title: "title".into(),
            columns: vec!["one".into(), "two".into()],
            rows: vec![
                Row { label: "first".into(), panels: vec![panel(300, [255, 0, 0]), panel(300, [0, 255, 0])] },
                Row { label: String::new(), panels: vec![panel(100, [0, 0, 255]), panel(100, [0, 255, 0])] },
            ],
            scale: Some(Scale { caption: "weight".into(), low: "0".into(), high: "1".into() }),
            note: "small print ".repeat(40),
        };
        let page = sheet.draw();
        assert_eq!(page.width(), 600 + GAP + 2 * MARGIN);
        let count = |color| {
            let pixels = (0..page.height()).flat_map(|y| (0..page.width()).map(move |x| (x, y)));
            pixels.filter(|(x, y)| page.get(*x, *y) == color).map(|(x, _)| x).collect::<Vec<_>>()
        };
        let green = count([0, 255, 0]);
        assert_eq!(green.len(), 400 * 50);
        assert_eq!(green.iter().min(), Some(&(MARGIN + 300 + GAP)));
        assert_eq!(count([255, 0, 0]).len(), 300 * 50);
        assert_eq!(count([0, 0, 255]).len(), 100 * 50);
    }

    #[test]
    fn an_empty_page_is_a_page() {
        assert_eq!(Sheet::default().draw().width(), LEAST_WIDTH);
    }
}
