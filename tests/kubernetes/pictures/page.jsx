/**
 * Draws one dashboard with Grafana's own panel components, from `window.view`, which draw.py fills in: the dashboard's
 * panels with their places on the page, and what Prometheus answered to each query. Nothing is asked from here.
 *
 * What Grafana does between the answer and the component is done by Grafana's own code too: field settings and overrides,
 * value mappings, units, table transformations. Grafana's state timeline is not among the published components: that one
 * is drawn here, on Grafana's chart component, with Grafana's words, colours and axes.
 */
import {
  applyFieldOverrides,
  cacheFieldDisplayNames,
  createTheme,
  dateTime,
  FieldType,
  formattedValueToString,
  getDisplayValueAlignmentFactors,
  getFieldDisplayName,
  getFieldDisplayValues,
  Registry,
  standardTransformers,
  standardTransformersRegistry,
  ThemeContext,
  toDataFrame,
  transformDataFrame,
} from '@grafana/data';
import {
  AxisPlacement,
  BarGauge,
  BigValue,
  GlobalStyles,
  PanelChrome,
  ScaleDirection,
  ScaleOrientation,
  TimeSeries,
  UPlotChart,
  UPlotConfigBuilder,
  VizRepeater,
} from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { Component } from 'react';
import { createRoot } from 'react-dom/client';

const view = window.view;
const theme = createTheme({ colors: { mode: 'dark' } });
const timeZone = 'utc';
const timeRange = { from: dateTime(view.start * 1000), to: dateTime(view.end * 1000) };
timeRange.raw = { from: timeRange.from, to: timeRange.to };
const CELL = view.width / 24;
const ROW = 38; // Grafana's 30 pixels a row and 8 between panels

const transformers = new Map(Object.values(standardTransformers).map((one) => [one.id, one])); // some are there under two names
standardTransformersRegistry.setInit(() =>
  ['joinByField', 'merge', 'filterFieldsByName', 'organize'].map((id) => ({
    id,
    name: id,
    transformation: async () => transformers.get(id),
  }))
);

// Every field setting that the dashboards use: Grafana's own registry comes with its editors, which are not published.
const SETTINGS = ['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'thresholds', 'color', 'mappings', 'links'];
const CUSTOM = [
  'align', 'cellOptions', 'filterable', 'drawStyle', 'lineInterpolation', 'lineWidth', 'fillOpacity', 'showPoints', 'spanNulls',
  'stacking', 'thresholdsStyle', 'lineStyle', 'axisSoftMax', 'minWidth', 'width',
];
const fieldConfigRegistry = new Registry(() =>
  [...SETTINGS.map((path) => [path, path, false]), ...CUSTOM.map((path) => [`custom.${path}`, path, true])].map(([id, path, isCustom]) => ({
    id,
    path,
    isCustom,
    name: id,
    process: (value) => value,
    shouldApply: () => true,
  }))
);

function frames(panel) {
  const several = panel.results.length > 1;
  return panel.results.flatMap(({ target, series }) =>
    target.format === 'table' ? [tableFrame(target, series, several)] : series.map((one) => seriesFrame(target, one))
  );
}

function seriesFrame(target, { metric, values, value }) {
  const pairs = values ?? [value];
  const name = target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => metric[label] ?? '');
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: pairs.map(([time]) => time * 1000) },
      { name: 'Value', type: FieldType.number, labels: metric, values: pairs.map(([, text]) => Number(text)), config: { displayNameFromDS: name } },
    ],
  });
}

function tableFrame(target, series, several) {
  const labels = [...new Set(series.flatMap((one) => Object.keys(one.metric)))].sort();
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: series.map((one) => one.value[0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, values: series.map((one) => one.metric[label] ?? '') })),
      { name: several ? `Value #${target.refId}` : 'Value', type: FieldType.number, values: series.map((one) => Number(one.value[1])) },
    ],
  });
}

function configured(panel, data) {
  const shown = applyFieldOverrides({
    data,
    fieldConfig: panel.fieldConfig,
    fieldConfigRegistry,
    replaceVariables: (text) => text,
    theme,
    timeZone,
  });
  cacheFieldDisplayNames(shown);
  return shown;
}

function Lines({ panel, data, width, height }) {
  const mark = (builder) => {
    builder.addHook('draw', (u) => {
      for (const { time, color } of view.marks) {
        const x = Math.round(u.valToPos(time, 'x', true));
        if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) {
          continue;
        }
        u.ctx.save();
        u.ctx.strokeStyle = theme.visualization.getColorByName(color);
        u.ctx.setLineDash([4, 4]);
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
        u.ctx.restore();
      }
    });
  };
  return (
    <TimeSeries
      frames={data.map(graphable)}
      width={width}
      height={height}
      timeRange={timeRange}
      timeZone={timeZone}
      legend={panel.options.legend}
      options={panel.options}
    >
      {(builder) => {
        mark(builder);
        return null;
      }}
    </TimeSeries>
  );
}

/** As Grafana's panel does it: what is no number is a gap. */
function graphable(frame) {
  const finite = (field) => ({ ...field, values: field.values.map((value) => (Number.isFinite(value) ? value : null)) });
  return { ...frame, fields: frame.fields.map((field) => (field.type === FieldType.number ? finite(field) : field)) };
}

function Timeline({ panel, data, width, height }) {
  const rows = data.flatMap((frame) =>
    frame.fields
      .filter((field) => field.type === FieldType.number)
      .map((field) => ({ name: getFieldDisplayName(field, frame, data), spans: spans(frame.fields[0].values, field) }))
  );
  const labels = rows.map((row) => row.name);
  const builder = new UPlotConfigBuilder(timeZone);
  builder.addScale({ scaleKey: 'x', isTime: true, orientation: ScaleOrientation.Horizontal, direction: ScaleDirection.Right, range: () => [view.start * 1000, view.end * 1000] });
  builder.addScale({ scaleKey: 'y', isTime: false, orientation: ScaleOrientation.Vertical, direction: ScaleDirection.Up, range: () => [0, rows.length] });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: AxisPlacement.Bottom, timeZone, theme, grid: { show: true } });
  builder.addAxis({
    scaleKey: 'y',
    isTime: false,
    placement: AxisPlacement.Left,
    theme,
    grid: { show: false },
    ticks: { show: false },
    splits: () => rows.map((_, index) => rows.length - index - 0.5),
    values: () => labels,
  });
  builder.addSeries({ scaleKey: 'y', theme, fieldIndex: { frameIndex: 0, fieldIndex: 1 }, pathBuilder: () => null, showPoints: 'never', lineColor: 'transparent' });
  builder.addHook('draw', (u) => rows.forEach((row, index) => drawRow(u, row, index, rows.length, panel.options.rowHeight)));
  const times = [view.start * 1000, view.end * 1000];
  return <UPlotChart config={builder} data={[times, times.map(() => null)]} width={width} height={height} />;
}

/** Runs of the same word. A gap of several steps is a gap. */
function spans(times, field) {
  const found = [];
  times.forEach((time, index) => {
    const shown = field.display(field.values[index]);
    const last = found.at(-1);
    const near = last && time - last.end < 3500 * view.step;
    if (near) {
      last.end = time;
    }
    if (!near || last.text !== shown.text) {
      found.push({ start: time, end: time, text: formattedValueToString(shown), color: shown.color });
    }
  });
  return found;
}

function drawRow(u, row, index, count, share) {
  const pixels = window.devicePixelRatio;
  const full = u.bbox.height / count;
  const top = u.bbox.top + index * full + (full * (1 - share)) / 2;
  u.ctx.save();
  u.ctx.font = `${12 * pixels}px ${theme.typography.fontFamily}`;
  u.ctx.textAlign = 'left';
  u.ctx.textBaseline = 'middle';
  for (const span of row.spans) {
    const left = Math.max(u.valToPos(span.start, 'x', true), u.bbox.left);
    const right = Math.max(u.valToPos(span.end, 'x', true), left + pixels);
    u.ctx.globalAlpha = 0.85;
    u.ctx.fillStyle = span.color;
    u.ctx.fillRect(left, top, right - left, full * share);
    u.ctx.globalAlpha = 1;
    u.ctx.fillStyle = theme.colors.getContrastText(span.color);
    if (u.ctx.measureText(span.text).width + 8 * pixels < right - left) {
      u.ctx.fillText(span.text, left + 4 * pixels, top + (full * share) / 2);
    }
  }
  u.ctx.restore();
}

function displayed(panel, data) {
  return getFieldDisplayValues({
    fieldConfig: panel.fieldConfig,
    reduceOptions: panel.options.reduceOptions,
    replaceVariables: (text) => text,
    theme,
    data,
    timeZone,
  });
}

function Stat({ panel, data, width, height }) {
  const { colorMode, graphMode, justifyMode, textMode } = panel.options;
  return (
    <VizRepeater
      getValues={() => displayed(panel, data)}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={({ value, width, height, alignmentFactors }) => (
        <BigValue
          value={value.display}
          alignmentFactors={alignmentFactors}
          width={width}
          height={height}
          theme={theme}
          colorMode={colorMode}
          graphMode={graphMode}
          justifyMode={justifyMode}
          textMode={textMode}
          wideLayout
        />
      )}
      width={width}
      height={height}
      source={data}
      renderCounter={0}
      orientation="auto"
      autoGrid
    />
  );
}

function Bars({ panel, data, width, height }) {
  const { displayMode, orientation, valueMode, showUnfilled, minVizWidth, minVizHeight } = panel.options;
  return (
    <VizRepeater
      getValues={() => displayed(panel, data)}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={({ value, width, height, alignmentFactors, orientation, count }) => (
        <BarGauge
          value={value.display}
          field={value.field}
          display={value.view?.getFieldDisplayProcessor(value.colIndex)}
          alignmentFactors={alignmentFactors}
          width={width}
          height={height}
          theme={theme}
          orientation={orientation}
          displayMode={displayMode}
          valueDisplayMode={valueMode}
          showUnfilled={showUnfilled}
          itemSpacing={8}
          lcdCellWidth={12}
        />
      )}
      width={width}
      height={height}
      source={data}
      renderCounter={0}
      orientation={orientation}
      minVizWidth={minVizWidth}
      minVizHeight={minVizHeight}
      itemSpacing={8}
    />
  );
}

function Rows({ panel, data, width, height }) {
  return (
    <TableNG
      data={data[0]}
      width={width}
      height={height}
      sortBy={panel.options.sortBy}
      cellHeight={panel.options.cellHeight}
      fieldConfig={panel.fieldConfig}
      enableVirtualization={false}
      timeRange={timeRange}
    />
  );
}

const KINDS = { timeseries: Lines, 'state-timeline': Timeline, stat: Stat, bargauge: Bars, table: Rows };

function Panel({ panel, data }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: x * CELL, top: y * ROW, width: w * CELL - 8, height: h * ROW - 8 };
  if (panel.type === 'row') {
    return (
      <div style={{ ...place, ...theme.typography.h5, padding: '4px 2px', color: theme.colors.text.maxContrast }}>{panel.title}</div>
    );
  }
  const Kind = KINDS[panel.type];
  const empty = data.every((frame) => frame.length === 0);
  return (
    <div style={place} className="panel" data-title={panel.title} data-empty={empty}>
      <PanelChrome title={panel.title} description={panel.description} width={place.width} height={place.height}>
        {(width, height) =>
          empty ? (
            <div style={{ display: 'flex', width, height, alignItems: 'center', justifyContent: 'center', color: theme.colors.text.secondary }}>
              {panel.fieldConfig.defaults.noValue ?? 'No data'}
            </div>
          ) : (
            <Guard title={panel.title}>
              <Kind panel={panel} data={data} width={width} height={height} />
            </Guard>
          )
        }
      </PanelChrome>
    </div>
  );
}

/** A panel that fails says so, instead of taking the whole page with it. */
class Guard extends Component {
  state = { error: null };
  static getDerivedStateFromError(error) {
    return { error };
  }
  render() {
    return this.state.error ? <pre className="failed">{String(this.state.error.stack)}</pre> : this.props.children;
  }
}

function Page({ panels }) {
  const bottom = Math.max(...view.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ background: theme.colors.background.canvas, padding: 12, width: view.width + 16 }}>
        <div style={{ display: 'flex', gap: 16, alignItems: 'baseline', paddingBottom: 10 }}>
          <span style={{ ...theme.typography.h3, color: theme.colors.text.maxContrast }}>{view.title}</span>
          {view.variables.map(([label, value]) => (
            <span key={label} style={{ color: theme.colors.text.secondary }}>
              {label} <b style={{ color: theme.colors.text.primary }}>{value}</b>
            </span>
          ))}
          <span style={{ marginLeft: 'auto', color: theme.colors.text.link }}>{view.links.join('   ')}</span>
        </div>
        <div style={{ position: 'relative', height: bottom * ROW }}>{panels}</div>
      </div>
    </ThemeContext.Provider>
  );
}

/** Transformations are asynchronous streams, so they run before anything is drawn. */
async function prepared(panel) {
  if (panel.type === 'row') {
    return [];
  }
  const transformed = await new Promise((resolve) =>
    transformDataFrame(panel.transformations ?? [], frames(panel), { interpolate: (text) => text }).subscribe(resolve)
  );
  return configured(panel, transformed);
}

const root = document.createElement('div');
document.body.append(root);
const data = await Promise.all(view.panels.map(prepared));
createRoot(root).render(<Page panels={view.panels.map((panel, index) => <Panel key={index} panel={panel} data={data[index]} />)} />);
