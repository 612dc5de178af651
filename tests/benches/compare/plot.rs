//! A plot with the table of the peers as bars, for the README.

use crate::metrics::{Metric, Results};
use crate::peers::Peer;
use crate::report::number;
use crate::statistics::Spread;
use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// In pixels. The background is white, because GitHub also has a dark theme.
const SIZE: (u32, u32) = (800, 654);
const BARS_BEGIN: i32 = 72;
const BARS_LENGTH: f64 = 240.0;
const FIRST_BAR: i32 = 50;
const BAR_DISTANCE: i32 = 21;
const HALF_BAR: i32 = 7;
const HALF_WHISKER: i32 = 4;

const OURS: RGBColor = RGBColor(194, 65, 12);
const THEIRS: RGBColor = RGBColor(168, 176, 188);
const INK: RGBColor = RGBColor(31, 41, 55);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws a panel for each metric, with a bar for each peer.
pub(crate) fn draw(results: &Results, path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    for (panel, metric) in root.split_evenly((3, 2)).iter().zip(Metric::ALL) {
        draw_panel(panel, metric, results)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(panel: &Area, metric: Metric, results: &Results) -> Result<()> {
    let better = if metric.higher_is_better() {
        "higher"
    } else {
        "lower"
    };
    let what = format!("{}, {better} is better", metric.unit());
    panel.draw(&Text::new(
        metric.title(),
        (12, 10),
        text(17.0, FontStyle::Bold, HPos::Left),
    ))?;
    panel.draw(&Text::new(
        what,
        (12, 28),
        text(14.0, FontStyle::Normal, HPos::Left),
    ))?;

    let spreads = Peer::ALL.map(|peer| (peer, results.spread(metric, peer)));
    let max = spreads
        .iter()
        .filter_map(|(_, spread)| Some(spread.as_ref()?.max));
    let max = max.fold(f64::MIN_POSITIVE, f64::max);
    let mut y = FIRST_BAR + HALF_BAR;
    for (peer, spread) in spreads {
        if let Some(spread) = spread {
            draw_bar(panel, y, peer, spread, max)?;
        }
        y += BAR_DISTANCE;
    }
    Ok(())
}

/// Draws a bar as long as the median, with a whisker from the minimum to the maximum.
fn draw_bar(panel: &Area, y: i32, peer: Peer, spread: Spread, max: f64) -> Result<()> {
    #[allow(clippy::cast_possible_truncation)] // to pixels
    let x = |value: f64| BARS_BEGIN + (value / max * BARS_LENGTH).round() as i32;
    let (color, style) = if peer == Peer::Ours {
        (OURS, FontStyle::Bold)
    } else {
        (THEIRS, FontStyle::Normal)
    };
    let name = text(15.0, style, HPos::Right).pos(Pos::new(HPos::Right, VPos::Center));
    panel.draw(&Text::new(peer.name(), (BARS_BEGIN - 8, y), name))?;

    let bar = [(BARS_BEGIN, y - HALF_BAR), (x(spread.median), y + HALF_BAR)];
    panel.draw(&Rectangle::new(bar, color.filled()))?;
    let min_x = x(spread.min);
    let max_x = x(spread.max);
    for line in [
        [(min_x, y), (max_x, y)],
        [(min_x, y - HALF_WHISKER), (min_x, y + HALF_WHISKER)],
        [(max_x, y - HALF_WHISKER), (max_x, y + HALF_WHISKER)],
    ] {
        panel.draw(&PathElement::new(line, INK))?;
    }

    let value = text(15.0, style, HPos::Left).pos(Pos::new(HPos::Left, VPos::Center));
    panel.draw(&Text::new(number(spread.median), (max_x + 7, y), value))?;
    Ok(())
}

fn text(size: f64, style: FontStyle, anchor: HPos) -> TextStyle<'static> {
    let font = FontDesc::new(FontFamily::SansSerif, size, style);
    font.color(&INK).pos(Pos::new(anchor, VPos::Top))
}
