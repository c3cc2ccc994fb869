"""Style sheet of the HTML report; it is written into the page, which loads nothing."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5d6b7c; --line: #dfe4ea; --zebra: #f8f9fb;
  --good: #14733f; --good-back: #e3f5ea; --bad: #b3261e; --bad-back: #fde9e7;
  --transformer: #2463c9; --denoise: #c2570c; --loop: #7a3fb8; --other: #0f7c80;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2028; --ink: #e4e9f0; --soft: #97a5b6; --line: #2c3541; --zebra: #1e252e;
    --good: #6fd69b; --good-back: #17392a; --bad: #ff8f86; --bad-back: #45211f;
    --transformer: #75a7ff; --denoise: #ffa45c; --loop: #c79bff; --other: #5fd0d3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
header { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; justify-content: space-between; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 18px; font-weight: 650; }
p { margin: 8px 0; max-width: 80ch; }
.eyebrow { margin: 0; color: var(--soft); font-size: 13px; }
.soft { color: var(--soft); }
.badge { padding: 6px 16px; border-radius: 999px; font-weight: 700; letter-spacing: 0.05em; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.badge.good { background: var(--good-back); } .badge.bad { background: var(--bad-back); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.failures { margin: 16px 0 0; padding: 12px 16px 12px 34px; color: var(--bad); background: var(--bad-back); }
.failures { border-color: transparent; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; margin-top: 24px; }
.tile { padding: 14px 16px; }
.tile .what { color: var(--soft); font-size: 13px; }
.tile .figure { font-size: 24px; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tile .limit { color: var(--soft); font-size: 13px; white-space: pre-line; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.picture { padding: 14px 16px 16px; }
.picture .caption { display: flex; justify-content: space-between; gap: 12px; margin-bottom: 10px; }
.picture .caption span:first-child { font-weight: 600; overflow-wrap: anywhere; }
.picture .caption span:last-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.triple figure { margin: 0; }
.triple img { display: block; width: 100%; height: auto; border-radius: 4px; background: #000; }
.triple img.small { image-rendering: pixelated; }
.triple figcaption { margin-top: 4px; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.plot { padding: 16px; }
.plot svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .series { fill: none; stroke-width: 2; }
svg .limit-line { stroke-width: 1.5; stroke-dasharray: 5 4; fill: none; }
svg .transformer { stroke: var(--transformer); } svg .denoise { stroke: var(--denoise); }
svg .loop { stroke: var(--loop); } svg .series.loop { stroke-width: 4; } svg .shared { stroke: var(--soft); }
svg .other { stroke: var(--other); }
svg circle { stroke-width: 2; fill: var(--card); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom: 1px solid var(--line); }
td.text, th.text { text-align: left; }
tbody + tbody tr:first-child td { border-top: 1px solid var(--line); }
tbody:nth-of-type(even) td { background: var(--zebra); }
tr.bad td { color: var(--bad); font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; padding: 16px; margin: 0; }
.facts { font-size: 14px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 8px; }
}
@media print { body { background: none; } .card, h2 { break-inside: avoid; } }
"""
