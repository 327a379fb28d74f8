'use strict';
{
  const data = JSON.parse(document.getElementById('data').textContent);
  const draw = data.points ? sweepPage : data.model.before === undefined ? reportPage : comparisonPage;
  const parts = draw(data);
  document.getElementById('page').append(html('main', {}, parts.filter(Boolean)));
}
